"""Outboxes: messages that are recorded in a transaction, with what it writes otherwise, and published once it has committed.

The row in ``queue_log`` is the outbox: it holds the message. Rolled back, it never was. Committed, it is published right then by
whoever committed; should that one not come to it, the relay does (see :mod:`celery_idempotent.producer.relay`).
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import CO_GENERATOR
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, cast

from celery_idempotent.core.begin import begin, begin_before_savepoints
from celery_idempotent.core.transactions import refuse_autocommit, transactional
from celery_idempotent.errors import (
    ConfigurationError,
    DuplicateMessageError,
    MessageMismatchError,
    StoreError,
    StoreUnavailableError,
)
from celery_idempotent.producer.publisher import Publisher

if TYPE_CHECKING:
    from types import FrameType

    from celery.result import AsyncResult
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, SessionTransaction, scoped_session

    from celery_idempotent.core.records import Found, MessageKey, Recorded
    from celery_idempotent.core.store import Store
    from celery_idempotent.producer.guarded import Guarded
    from celery_idempotent.producer.publisher import Outgoing
    from celery_idempotent.queue_log import QueueLog

__all__ = ["OUTBOX", "PUBLISH_WITHIN", "Outbox", "current_outbox", "outbox"]

logger = logging.getLogger("celery_idempotent")

#: Seconds for which a row of the outbox is its recorder's to publish, from when it was recorded. After a transaction that took longer a
#: relay may publish it too: a copy too many, which the claim absorbs.
PUBLISH_WITHIN = 5.0

#: The execution option by which a connection knows the outbox that is published by whoever commits it.
OUTBOX = "celery_idempotent_outbox"

#: Where a session keeps its outbox.
_INFO = "celery_idempotent_outbox"

#: Messages that a batch records and publishes in one go: few enough to be published while they are its own to publish.
BATCH = 500

#: Whose threads run a function in a copy of the context, which ends with it.
_THREAD_POOLS = ("anyio", "asyncio", "concurrent", "threading")


@dataclass(slots=True, eq=False)
class _Block:
    """A ``with outbox(...)``, or an atomic body.

    Attributes:
        box: What takes its calls; ``None`` if they are sent at once.
        around: The block that it is in.
        left: Whether it has ended. A task of an event loop, or a thread, that was begun in it may outlive it.
    """

    box: Outbox | None
    around: _Block | None
    left: bool = False


_current: ContextVar[_Block | None] = ContextVar("celery_idempotent_outbox", default=None)


def _innermost() -> _Block | None:
    """The innermost block, here and now, that has not ended."""
    block = _current.get()
    while block is not None and block.left:
        block = block.around
    return block


def current_outbox(queue_log: QueueLog) -> Outbox | None:
    """What takes a call that is made here and now, in this thread or task of an event loop.

    That is the innermost ``with outbox(...)`` or atomic body, as far as that is one of the same queue log and not over.
    """
    block = _innermost()
    box = None if block is None else block.box
    return box if box is not None and box.takes(queue_log) else None


@contextmanager
def within(box: Outbox | None) -> Iterator[None]:
    """Have an outbox take the calls of the block; or none.

    Raises:
        ConfigurationError: The block's code runs in other contexts than its beginning, and is not seen to be in it.
    """
    _refuse_fleeting_context()
    around = _innermost()
    block = _Block(box, around)
    _current.set(block)
    try:
        yield
    finally:
        block.left = True
        if _current.get() is block:
            _current.set(around)
        elif not _is_around(block, _current.get()) and not isinstance(sys.exception(), GeneratorExit):
            raise ConfigurationError(
                "with outbox(...) was left in another context than it was entered in, so the calls in between were not seen to be in "
                "it, and were sent at once: enter and leave it in one function, or in one coroutine"
            )


def _is_around(block: _Block, inner: _Block | None) -> bool:
    while inner is not None and inner is not block:
        inner = inner.around
    return inner is block


def _refuse_fleeting_context() -> None:
    """Refuse a block in a generator that a pool of threads runs as far as to the ``yield``.

    FastAPI enters a dependency without ``async`` so: in a copy of the request's context, which is gone when the endpoint is called.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, if only for what looks at callers
    in_generator, module = False, ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module not in (__name__, "contextlib"):
            if not frame.f_code.co_flags & CO_GENERATOR:
                break
            in_generator = True
        frame = frame.f_back
    if in_generator and frame is not None and module.partition(".")[0] in _THREAD_POOLS:
        raise ConfigurationError(
            "with outbox(...) is in a generator that a pool of threads enters, as FastAPI does with a dependency without async: its "
            "caller would not be in the block, and would send its calls at once; write `async def`, or put the block into the caller"
        )


def outbox(
    session: Session | scoped_session[Any] | Connection | None = None,
) -> AbstractContextManager[None]:
    """Record the calls of the block, and publish them when they are committed.

    With a session, ``delay``, ``apply_async`` and signatures of an ``IdempotentTask`` (groups, chains and chords too) write their
    message to ``queue_log`` in the session's transaction, and are published right after its commit, wherever that is::

        with outbox(session):
            session.add(order)
            charge.delay(order.id, 500)
            session.commit()

    A rollback, of a savepoint too, leaves nothing of them. A process that dies after the commit, and a broker that takes nothing
    then, leave rows that the relay publishes. Duplicates are told, or raised, at the call.

    Without one, the block is a batch: its calls are recorded at its end, some hundreds in one statement, and published by one
    producer. Their results know from then on whether they were duplicates (``result.duplicate``, ``None`` before). An error that
    leaves the block leaves nothing recorded. Inside of another outbox, and of an atomic task, a batch joins its transaction.

    Args:
        session: A SQLAlchemy session, or a registry of them such as Flask-SQLAlchemy's ``db.session``, on the store's database.
            With Core, a connection; the block has to be around its transaction then: what is committed later is left to the
            relay. ``None`` for a batch.

    Raises:
        ConfigurationError: It is no such session, leads to another kind of database, or the store has no transactions.
        ExceptionGroup: At the end of a batch, of the DuplicateMessageError and MessageMismatchError of single calls; all others
            were sent.
        StoreUnavailableError: At the end of a batch: the store gave no answer. Nothing was sent, or (beyond some hundreds) the
            first of them; the error says so.

    Hazard:
        Calls by name (``send_task``) and of tasks that are no ``IdempotentTask`` are published at once, with a warning in the log.
        A result must not be waited for inside of the block.

    Atomicity: with a session, its transaction. A batch is as many calls: each is recorded and sent, or not.
    """
    if session is None:
        return _batch()
    if callable(registry := getattr(session, "registry", None)) and not hasattr(session, "sync_session"):
        session = cast("Session", registry())
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    if isinstance(session, Session):
        return within(_of_session(session))
    if isinstance(session, Connection):
        return _around(session)
    if hasattr(session, "run_sync"):
        raise ConfigurationError(
            "outbox() takes a plain Session: with an AsyncSession put the block into a function of it, and call "
            "`await session.run_sync(function)`"
        )
    raise ConfigurationError(f"outbox() takes a SQLAlchemy session or connection, not {type(session).__name__}")


class OutgoingCall(Protocol):
    """A call on its way out, as an outbox takes it."""

    #: What it is recorded in.
    box: Outbox | None

    @property
    def task(self) -> Guarded:
        """The task that is called."""

    def record_in(self, box: Outbox) -> AsyncResult[Any]:
        """Record it in an outbox's transaction; its result."""

    def promised(self) -> AsyncResult[Any]:
        """Its result, if it is recorded later: that may be another's then."""

    def record_together(self, calls: Sequence[Any]) -> list[Recorded | Found]:
        """Record it and others of the same app, in as few statements as it takes."""

    def followed(self, answer: Recorded | Found) -> AsyncResult[Any]:
        """What it comes to, as it was recorded or found; its result."""

    def taken_back(self) -> bool:
        """Take it back if it was recorded, and not published; whether that is certain."""


class Outbox:
    """The messages of one transaction after another.

    Args:
        connect: The connection of the transaction.
    """

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._connection: Connection | None = None
        self._messages: list[Outgoing] = []
        self._duplicates: list[tuple[QueueLog, MessageKey]] = []

    # -- for the producer ----------------------------------------------------------------------------------------------

    def take(self, sending: OutgoingCall) -> AsyncResult[Any]:
        """Record a call; its result."""
        return sending.record_in(self.that_commits())

    def takes(self, queue_log: QueueLog) -> bool:  # noqa: ARG002 - for atomic bodies to say
        """Whether a call of this queue log's is to be recorded here, or sent at once."""
        return True

    @property
    def joins(self) -> bool:
        """Whether what is recorded is part of a transaction of somebody's."""
        return True

    def store(self, queue_log: QueueLog) -> Store:
        """A queue log's store, with its verbs in the transaction."""
        store = transactional(queue_log.store, "outbox(session)")
        connection = self._connect()
        if connection is not self._connection:
            refuse_autocommit(
                connection,
                "outbox() needs a transaction, and this session is in autocommit; give it another isolation level",
            )
            self._connection = connection
        begin(connection)
        return store.within(connection)

    def add(self, message: Outgoing) -> None:
        """Publish a message when the transaction has committed."""
        self._messages.append(message)

    def count(self, queue_log: QueueLog, key: MessageKey) -> None:
        """Count a duplicate when the transaction has committed: its row is not to be locked until then."""
        self._duplicates.append((queue_log, key))

    # -- for whoever ends the transaction ------------------------------------------------------------------------------

    def publish(self) -> None:
        """It has committed: publish what is there."""
        messages, duplicates = self._messages, self._duplicates
        self.discard()
        if not (messages or duplicates):
            return
        with within(None):  # what is run eagerly is behind it, not in it
            for queue_log, some in groupby(messages, lambda message: message.task.queue_log):
                ours = self._still_there(queue_log, list(some))
                Publisher.of(queue_log).publish(ours)
                if queue_log.outcomes is not None:
                    for message in ours:
                        if message.tell is not None:
                            message.tell()
            for queue_log, key in duplicates:
                Publisher.of(queue_log).count_duplicate(key)

    def discard(self) -> None:
        """It was rolled back; or nobody can tell, and the relay will."""
        self._messages, self._duplicates = [], []

    def that_commits(self) -> Outbox:
        """This one, or the atomic body's whose connection it is on."""
        found: Outbox | None = self._connect().get_execution_options().get(OUTBOX)
        return found or self

    def _still_there(self, queue_log: QueueLog, messages: list[Outgoing]) -> list[Outgoing]:
        """Those whose rows are there.

        A commit that succeeds has not committed everything: a savepoint may have been rolled back, in words too; PostgreSQL answers by a
        rollback, without an error, after an error that was caught, even one that only the driver heard of; after a deadlock MySQL
        goes on in another transaction. So the rows are read, rather than all of that followed.
        """
        if not messages:
            return messages
        try:
            task_ids = transactional(queue_log.store).recorded([message.key for message in messages])
        except StoreError as error:
            logger.warning("%d messages are left to the relay, the store gives no answer: %s", len(messages), error)
            return []
        # Behind what was rolled back somebody else may have recorded the id.
        return [message for message in messages if task_ids.get(message.key) == message.marker.task_id]


# -- with a session ----------------------------------------------------------------------------------------------------------


class _SessionOutbox(Outbox):
    """The outbox of a session, for as long as that lives: it may commit after the block."""

    def __init__(self, session: Session) -> None:
        from sqlalchemy import event

        super().__init__(self._connection_of_session)
        self._session = session
        self._committed = False
        event.listen(session, "after_begin", self._after_begin)
        event.listen(session, "after_commit", self._after_commit)
        event.listen(session, "after_transaction_end", self._after_end)

    def _connection_of_session(self) -> Connection:
        from sqlalchemy.exc import UnboundExecutionError

        try:
            return self._session.connection()
        except UnboundExecutionError as error:
            raise ConfigurationError(
                "outbox(session) needs a session with a default bind, the store's database; this one has binds for single tables only"
            ) from error

    def _after_begin(self, session: Session, transaction: SessionTransaction, connection: Connection) -> None:  # noqa: ARG002
        begin_before_savepoints(connection)

    def _after_commit(self, session: Session) -> None:
        # Not of a savepoint; nor of a session inside of somebody's transaction, whose commit nobody tells us of.
        outermost = not session.in_nested_transaction()
        self._committed = outermost and self._connection is not None and not self._connection.in_transaction()

    def _after_end(self, session: Session, transaction: SessionTransaction) -> None:  # noqa: ARG002 - SQLAlchemy's signature
        if transaction.parent is not None:
            return
        committed, self._committed = self._committed, False
        if committed:
            self.publish()
        else:
            self.discard()


def _of_session(session: Session) -> Outbox:
    found: Outbox | None = session.info.get(_INFO)
    if found is None:
        found = session.info[_INFO] = _SessionOutbox(session)
        if session.in_transaction() and session.get_bind().dialect.name == "sqlite":
            begin_before_savepoints(session.connection())
    return found


# -- with a connection -------------------------------------------------------------------------------------------------------


@contextmanager
def _around(connection: Connection) -> Iterator[None]:
    """An outbox around the transactions of a connection, which tells of a commit before it takes place."""
    from sqlalchemy import event

    box = Outbox(lambda: connection)
    commits = False

    def commit(_: Connection) -> None:
        nonlocal commits
        commits = True

    def began(_: Connection) -> None:
        nonlocal commits
        if commits:  # which took place, or there would be no other one
            commits = False
            box.publish()

    def rollback(_: Connection) -> None:
        box.discard()

    begin_before_savepoints(connection)
    listeners = (("commit", commit), ("begin", began), ("rollback", rollback))
    for name, listener in listeners:
        event.listen(connection, name, listener)
    try:
        with within(box):
            yield
        if commits and not connection.in_transaction():
            box.publish()
    finally:
        for name, listener in listeners:
            event.remove(connection, name, listener)


# -- without either ----------------------------------------------------------------------------------------------------------


@contextmanager
def _batch() -> Iterator[None]:
    around = _innermost()
    box = None if around is None else around.box
    if isinstance(box, _Batch):  # whose error leaves nothing of this one either
        with within(box):
            yield
        return
    batch = _Batch(box)
    with within(batch):
        yield
    batch.send()


class _Batch(Outbox):
    """Calls that are recorded together, in the transaction around them if there is one."""

    def __init__(self, around: Outbox | None) -> None:
        super().__init__(self._no_connection)
        self._around = around
        #: ``None`` once they are being sent.
        self._calls: list[tuple[OutgoingCall, AsyncResult[Any]]] | None = []
        self._lock = threading.Lock()
        #: Whose transaction takes what is sent now.
        self._outer: Outbox | None = None

    def _no_connection(self) -> Connection:  # pragma: no cover - it has a store instead
        raise AssertionError("a batch has no connection of its own")

    @property
    def joins(self) -> bool:
        return self._outer is not None

    def take(self, sending: OutgoingCall) -> AsyncResult[Any]:
        result = sending.promised()
        with self._lock:
            if self._calls is not None:
                self._calls.append((sending, result))
                return result
        # A thread that came to the block before its end, and to its call after it.
        sending.box = late = _Batch(None)
        late.take(sending)
        try:
            late.send()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return result

    def store(self, queue_log: QueueLog) -> Store:
        return queue_log.store if self._outer is None else self._outer.store(queue_log)

    def add(self, message: Outgoing) -> None:
        if self._outer is None:
            super().add(message)
        else:
            self._outer.add(message)

    def count(self, queue_log: QueueLog, key: MessageKey) -> None:
        if self._outer is None:
            super().count(queue_log, key)
        else:
            self._outer.count(queue_log, key)

    def _still_there(self, queue_log: QueueLog, messages: list[Outgoing]) -> list[Outgoing]:  # noqa: ARG002
        return messages  # each was recorded on its own, and nothing takes that back

    def send(self) -> None:
        """Record and publish, some hundreds at a time.

        Raises:
            ExceptionGroup: Of what is wrong with single calls.
            StoreUnavailableError: The store gave no answer.
        """
        with self._lock:
            every, self._calls = self._calls or [], None
        refused: list[Exception] = []
        sent = 0
        for queue_log, group in groupby(every, lambda call: call[0].task.queue_log):
            calls = list(group)
            around = self._around
            self._outer = around.that_commits() if around is not None and around.takes(queue_log) else None
            for first in range(0, len(calls), BATCH):
                some = calls[first : first + BATCH]
                try:
                    refused += self._send(some)
                except StoreError as error:
                    if self._outer is not None:
                        raise  # what becomes of the transaction is its owner's affair
                    raise self._explained(error, len(every), sent, [sending for sending, _ in some]) from error
                sent += len(some)
        if refused:
            raise ExceptionGroup(f"{len(refused)} of {len(every)} calls of the batch were not sent", refused)

    def _explained(self, error: StoreError, count: int, sent: int, calls: Sequence[OutgoingCall]) -> StoreError:
        """What to tell of calls whose recording was refused, or not answered: some may have been recorded, and are taken back."""
        unsent = isinstance(error, StoreUnavailableError) and error.unsent
        left = not unsent and not all(sending.taken_back() for sending in calls)
        if sent:
            told = f"the first {sent} of the {count} calls of the batch were sent"
        else:
            told = f"none of the {count} calls of the batch was sent"
        if left:
            told += f"{'' if sent else ' so far'}, but some of {len(calls)} were recorded and may be sent by a relay"
        elif sent:
            told += ", and no others"
        explained = type(error)(f"{error}; {told}")
        if isinstance(explained, StoreUnavailableError):
            explained.unsent = not (sent or left)
        return explained

    def _send(self, calls: list[tuple[OutgoingCall, AsyncResult[Any]]]) -> list[Exception]:
        refused: list[Exception] = []
        answers = calls[0][0].record_together([sending for sending, _ in calls])
        for (sending, result), answer in zip(calls, answers, strict=True):
            try:
                final = sending.followed(answer)
            except (DuplicateMessageError, MessageMismatchError) as error:
                result.duplicate = True
                refused.append(error)
            else:
                result.id, result.duplicate = final.id, final.duplicate
        if self._outer is None:
            self.publish()
        return refused
