"""Outboxes: messages that are recorded in a transaction, with what it writes otherwise, and published once it has committed.

The row in ``queue_log`` is the outbox: it holds the message. Rolled back, it never was. Committed, it is published right then by
whoever committed; should that one not come to it, the relay does (see :mod:`celery_idempotent.recovery`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

from celery_idempotent.errors import ConfigurationError, DuplicateMessageError, MessageMismatchError
from celery_idempotent.transactions import refuse_autocommit, transactional

if TYPE_CHECKING:
    from celery.result import AsyncResult
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.orm import Session, SessionTransaction, scoped_session

    from celery_idempotent.producer import Sending
    from celery_idempotent.publication import Outgoing
    from celery_idempotent.queue_log import QueueLog
    from celery_idempotent.records import MessageKey
    from celery_idempotent.store import Store

__all__ = ["OUTBOX", "PUBLISH_WITHIN", "Outbox", "current_outbox", "outbox"]

#: Seconds for which a row of the outbox is its recorder's to publish, from when it was recorded. After a transaction that took longer a
#: relay may publish it too: a copy too many, which the claim absorbs.
PUBLISH_WITHIN = 5.0

#: The execution option by which a connection knows the outbox that is published by whoever commits it.
OUTBOX = "celery_idempotent_outbox"

#: The execution option by which a connection knows the outboxes that are to be told of its errors.
_WATCHED = "celery_idempotent_watched"

#: Where a session keeps its outbox.
_INFO = "celery_idempotent_outbox"

#: Messages that a batch records and publishes in one go: few enough to be published while they are its own to publish.
BATCH = 500

_current: ContextVar[Outbox | None] = ContextVar("celery_idempotent_outbox", default=None)


def current_outbox(queue_log: QueueLog) -> Outbox | None:
    """What takes a call that is made here and now, in this thread or task of an event loop.

    That is the innermost ``with outbox(...)`` or atomic body, as far as that is one of the same queue log and not over.
    """
    box = _current.get()
    return box if box is not None and box.takes(queue_log) else None


@contextmanager
def within(box: Outbox | None) -> Iterator[None]:
    """Have an outbox take the calls of the block; or none."""
    token = _current.set(box)
    try:
        yield
    finally:
        _current.reset(token)


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
            first of them.

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
        #: How many messages there were before each savepoint, by its name.
        self._savepoints: dict[str, int] = {}
        #: Whether the database has refused a statement of the transaction: PostgreSQL then answers its commit by a rollback, without a word.
        self._doubted = False

    # -- for the producer ----------------------------------------------------------------------------------------------

    def take(self, sending: Sending) -> AsyncResult[Any]:
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
            self._watch(connection)
            self._connection = connection
        return store.within(connection)

    def add(self, message: Outgoing) -> None:
        """Publish a message when the transaction has committed."""
        self._messages.append(message)

    def count(self, queue_log: QueueLog, key: MessageKey) -> None:
        """Count a duplicate when the transaction has committed: its row is not to be locked until then."""
        self._duplicates.append((queue_log, key))

    # -- for whoever ends the transaction ------------------------------------------------------------------------------

    def publish(self) -> None:
        """It has committed."""
        messages, duplicates, doubted = self._messages, self._duplicates, self._doubted
        self.discard()
        if doubted:
            messages = [message for message in messages if message.is_there()]
        if not (messages or duplicates):
            return
        with within(None):  # what is run eagerly is behind it, not in it
            for queue_log, some in groupby(messages, lambda message: message.task.queue_log):
                ours = list(some)
                queue_log.publisher.publish(ours)
                if queue_log.outcomes is not None:
                    for message in ours:
                        if message.tell is not None:
                            message.tell()
            for queue_log, key in duplicates:
                queue_log.publisher.count_duplicate(key)

    def discard(self) -> None:
        """It was rolled back; or nobody can tell, and the relay will."""
        self._messages, self._duplicates, self._savepoints, self._doubted = [], [], {}, False

    # -- savepoints ----------------------------------------------------------------------------------------------------

    def that_commits(self) -> Outbox:
        """This one, or the atomic body's whose connection it is on."""
        found: Outbox | None = self._connect().get_execution_options().get(OUTBOX)
        return found or self

    def _watch(self, connection: Connection) -> None:
        from sqlalchemy import event
        from sqlalchemy.sql.expression import RollbackToSavepointClause, SavepointClause

        # By the statements: the event of a savepoint comes before that has a name.
        def before_execute(_: Connection, statement: Any, *__: Any) -> None:
            if isinstance(statement, SavepointClause):
                self._savepoints[statement.ident] = len(self._messages)
            elif isinstance(statement, RollbackToSavepointClause):
                del self._messages[self._savepoints.get(statement.ident, 0) :]

        event.listen(connection, "before_execute", before_execute)
        connection.execution_options(**{_WATCHED: (*connection.get_execution_options().get(_WATCHED, ()), self)})
        if not event.contains(connection.engine, "handle_error", _on_error):
            event.listen(connection.engine, "handle_error", _on_error)

    def doubt(self) -> None:
        """A statement of the transaction was refused: whether its commit commits is to be looked up."""
        self._doubted = True


def _on_error(context: ExceptionContext) -> None:
    """Of all connections of an engine, its owner's own included."""
    if context.connection is not None:
        for box in context.connection.get_execution_options().get(_WATCHED, ()):
            box.doubt()


# -- with a session ----------------------------------------------------------------------------------------------------------


class _SessionOutbox(Outbox):
    """The outbox of a session, for as long as that lives: it may commit after the block."""

    def __init__(self, session: Session) -> None:
        from sqlalchemy import event

        super().__init__(self._connection_of_session)
        self._session = session
        self._committed = False
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

    def begin(_: Connection) -> None:
        nonlocal commits
        if commits:  # which took place, or there would be no other one
            commits = False
            box.publish()

    def rollback(_: Connection) -> None:
        box.discard()

    listeners = (("commit", commit), ("begin", begin), ("rollback", rollback))
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
    around = _current.get()
    batch = _Batch(around)
    with within(batch):
        yield
    batch.send()


class _Batch(Outbox):
    """Calls that are recorded together, in the transaction around them if there is one."""

    def __init__(self, around: Outbox | None) -> None:
        super().__init__(self._no_connection)
        self._around = around
        self._calls: list[tuple[Sending, AsyncResult[Any]]] = []
        #: Whose transaction takes what is sent now.
        self._outer: Outbox | None = None

    def _no_connection(self) -> Connection:  # pragma: no cover - it has a store instead
        raise AssertionError("a batch has no connection of its own")

    @property
    def joins(self) -> bool:
        return self._outer is not None

    def take(self, sending: Sending) -> AsyncResult[Any]:
        result = sending.promised()
        self._calls.append((sending, result))
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

    def send(self) -> None:
        """Record and publish, some hundreds at a time.

        Raises:
            ExceptionGroup: Of what is wrong with single calls.
            StoreUnavailableError: The store gave no answer.
        """
        refused: list[Exception] = []
        for queue_log, group in groupby(self._calls, lambda call: call[0].task.queue_log):
            calls = list(group)
            around = self._around
            self._outer = around.that_commits() if around is not None and around.takes(queue_log) else None
            for first in range(0, len(calls), BATCH):
                refused += self._send(calls[first : first + BATCH])
        if refused:
            raise ExceptionGroup(f"{len(refused)} of {len(self._calls)} calls of the batch were not sent", refused)

    def _send(self, calls: list[tuple[Sending, AsyncResult[Any]]]) -> list[Exception]:
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
