"""The outbox of a SQLAlchemy session, by its events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from celery_idempotent.core.begin import begin_before_savepoints
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.producer.batch import record_together
from celery_idempotent.producer.box import OUTBOX, Outbox
from celery_idempotent.producer.off_loop import PublishingThreads, off_the_loop

if TYPE_CHECKING:
    from celery.result import AsyncResult
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, SessionTransaction

    from celery_idempotent.core.records import MessageKey
    from celery_idempotent.producer.box import OutgoingCall
    from celery_idempotent.producer.guarded import UnrecordedCall
    from celery_idempotent.producer.publisher import Outgoing
    from celery_idempotent.queue_log import QueueLog

__all__ = ["of_session"]

T = TypeVar("T")

#: The key of a session's outbox in ``session.info``.
_INFO = "celery_idempotent_outbox"


def of_session(session: Session) -> Outbox:
    """Return a session's outbox."""
    found: Outbox | None = session.info.get(_INFO)
    if found is None:
        make = _AsyncSessionOutbox if _is_asynchronous(session) else _SessionOutbox
        found = session.info[_INFO] = make(session)
        if session.in_transaction() and session.get_bind().dialect.name == "sqlite":
            begin_before_savepoints(session.connection())
    return found


class _SessionOutbox(Outbox):
    """The outbox of a session. It lives as long as the session, which may commit after the block."""

    def __init__(self, session: Session) -> None:
        from sqlalchemy import event

        super().__init__(self._connection_of_session)
        self._session = session
        self._committed: SessionTransaction | None = None
        #: Calls without a row, and the innermost transaction in which each was made.
        self._plain: list[tuple[SessionTransaction | None, UnrecordedCall]] = []
        event.listen(session, "after_begin", self._after_begin)
        event.listen(session, "after_commit", self._after_commit)
        event.listen(session, "after_transaction_end", self._after_end)

    def _connection_of_session(self) -> Connection:
        from sqlalchemy.exc import UnboundExecutionError

        try:
            return self._session.connection()
        except UnboundExecutionError as error:
            raise ConfigurationError(
                "outbox(session) needs a session whose default bind is the store's database; this one has binds for single tables only"
            ) from error

    def send_later(self, queue_log: QueueLog, call: UnrecordedCall) -> None:
        body: Outbox | None = self._session.get_bind().get_execution_options().get(OUTBOX)
        if body is not None:  # the session is an atomic body's
            body.send_later(queue_log, call)
        else:
            self._plain.append((self._transaction(), call))

    def _transaction(self) -> SessionTransaction | None:
        """Return the innermost transaction; begin one if there is none, because otherwise no event would tell of a rollback."""
        if not self._session.in_transaction():
            self._session.begin()
        return self._session.get_nested_transaction() or self._session.get_transaction()

    def _after_begin(self, session: Session, transaction: SessionTransaction, connection: Connection) -> None:  # noqa: ARG002
        begin_before_savepoints(connection)

    def _after_commit(self, session: Session) -> None:
        self._committed = session.get_nested_transaction() or session.get_transaction()

    def _after_end(self, session: Session, transaction: SessionTransaction) -> None:  # noqa: ARG002 - SQLAlchemy's signature
        committed = self._committed is transaction
        if committed:
            self._committed = None
        if transaction.nested:
            self._savepoint_ended(transaction, kept=committed)
        elif transaction.parent is None:
            # The commit of a session inside a user's own transaction is not reported.
            if not (committed and self._connection is not None and not self._connection.in_transaction()):
                self.discard()
            plain, self._plain = self._plain, []
            if committed:
                self._unrecorded += [call for _, call in plain]
            self.publish()

    def _savepoint_ended(self, savepoint: SessionTransaction, *, kept: bool) -> None:
        """Keep or drop what has no row yet. Rows are written, or gone."""
        self._plain = [
            (savepoint.parent if at is savepoint else at, call)
            for at, call in self._plain
            if kept or at is not savepoint
        ]


class _AsyncSessionOutbox(_SessionOutbox):
    """The outbox of an ``AsyncSession``.

    Its database is asked only in SQLAlchemy's greenlets: in awaited calls, in ``run_sync``, and in the commit. Calls that are made elsewhere are
    kept until the commit.
    """

    def __init__(self, session: Session) -> None:
        from sqlalchemy import event

        super().__init__(session)
        #: Calls to be recorded, and the innermost transaction in which each was made.
        self._deferred: list[tuple[SessionTransaction | None, OutgoingCall, AsyncResult[Any]]] = []
        self._turn = asyncio.Lock()
        event.listen(session, "before_commit", self._before_commit)

    async def awaited(self, work: Callable[[], T]) -> T:
        from sqlalchemy.util import greenlet_spawn

        async with self._turn:  # a session serves one at a time
            return await greenlet_spawn(work)

    def take(self, sending: OutgoingCall) -> AsyncResult[Any]:
        if _in_greenlet():
            return super().take(sending)
        result = sending.promised()
        self.defer([(sending, result)])
        return result

    def defer(self, calls: Sequence[tuple[OutgoingCall, AsyncResult[Any]]]) -> bool:
        if _in_greenlet():
            return False
        transaction = self._transaction()
        self._deferred += [(transaction, sending, result) for sending, result in calls]
        return True

    def discard(self) -> None:
        super().discard()
        self._deferred = []

    def _before_commit(self, session: Session) -> None:
        if session.in_nested_transaction() or not self._deferred:
            return
        calls = [(sending, result) for _, sending, result in self._deferred]
        self._deferred = []
        record_together(self, calls, "the session")

    def _savepoint_ended(self, savepoint: SessionTransaction, *, kept: bool) -> None:
        super()._savepoint_ended(savepoint, kept=kept)
        others = [
            (savepoint.parent if at is savepoint else at, *call)
            for at, *call in self._deferred
            if kept or at is not savepoint
        ]
        self._deferred = others

    def _publish(
        self,
        messages: list[Outgoing],
        duplicates: list[tuple[QueueLog, MessageKey]],
        unrecorded: list[UnrecordedCall],
    ) -> None:
        from sqlalchemy.util import await_only

        publish = partial(super()._publish, messages, duplicates, unrecorded)
        if not _in_greenlet():
            publish()
            return
        tasks = [message.task for message in messages] + [call.task for call in unrecorded]
        logs = [task.queue_log for task in tasks] + [log for log, _ in duplicates]
        await_only(off_the_loop(logs[0], publish, PublishingThreads))


def _is_asynchronous(session: Session) -> bool:
    from sqlalchemy.exc import UnboundExecutionError

    try:
        return session.get_bind().dialect.is_async
    except UnboundExecutionError:  # refused at the first call
        return False


def _in_greenlet() -> bool:
    """Return whether SQLAlchemy can wait here for an asynchronous driver."""
    from sqlalchemy.util import concurrency

    return bool(concurrency.in_greenlet())
