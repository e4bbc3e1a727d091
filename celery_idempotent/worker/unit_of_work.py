"""The transaction of an atomic body: what the body writes, and how it ended, take effect together or not at all.

A unit of work belongs to one run of one body. Its connection is opened when the body first asks for it, and is none of the store's:
leases are renewed beside it. Whoever runs the body (:mod:`celery_idempotent.worker.perform`) ends the unit: by the write that ends the
message, in the same transaction, or by rolling back.
"""

# Longer than most: the transaction, and the listeners that tell how it went, are read together.

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING, Self

from celery_idempotent.core.begin import begin
from celery_idempotent.core.transactions import refuse_autocommit, transactional
from celery_idempotent.errors import ConfigurationError, IdempotentError, StoreUnavailableError
from celery_idempotent.producer.box import OUTBOX, Outbox

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.orm import Session

    from celery_idempotent.core.store import Store
    from celery_idempotent.queue_log import QueueLog

__all__ = ["RUNS", "NotCommittedError", "Setback", "UnitOfWork", "given_up_error"]

logger = logging.getLogger("celery_idempotent")

#: How often a body is run at most whose transaction gave way to another one (a deadlock, a serialization failure, a lock that was
#: waited for in vain), or whose connection broke, or could not be had.
RUNS = 5

#: The execution option by which a connection knows its unit.
_UNIT = "celery_idempotent_unit"


class Setback(Enum):
    """Why the transaction of a body gave way."""

    COLLIDED = auto()  # another transaction went first
    BROKE = auto()  # its connection broke, or the database takes nothing for now
    NOT_CONNECTED = auto()  # there was no connection to be had


class NotCommittedError(Exception):
    """A body's transaction was not committed. Never leaves the run.

    Args:
        error: Why.
        again: Whether the body may be run again for it.
    """

    def __init__(self, error: Exception, *, again: bool) -> None:
        super().__init__(error)
        self.error = error
        self.again = again


def given_up_error() -> IdempotentError:
    """Return what to tell of a commit that the database answers, or would answer, by a rollback."""
    return IdempotentError(
        "the transaction of this atomic body was not committed: a statement in it failed, the error was caught, and so the database "
        "rolled it back; run what may fail in begin_nested()"
    )


class UnitOfWork:
    """The transaction of one body.

    Args:
        queue_log: On whose store's database it is, with its session factory and its isolation level.
        contended: Whether the body was run before, and gave way to another transaction.

    Raises:
        ConfigurationError: The store has no transactions.
    """

    def __init__(self, queue_log: QueueLog, *, contended: bool = False) -> None:
        self._contended = contended
        self._store = transactional(queue_log.store)
        self._session_factory = queue_log.session_factory
        self._isolation_level = queue_log.isolation_level
        self._connection: Connection | None = None
        self._session: Session | None = None
        self._over = False
        self._committing = False
        self._undone = False
        #: The error by which the database ended the transaction, or a statement of it. The body may have caught it, but what it wrote
        #: before may be gone.
        self.gave_way: BaseException | None = None
        #: For what.
        self.setback: Setback | None = None
        #: Whether a commit was asked for, and how it went is not known.
        self.in_doubt = False
        #: Whether the driver tells how the transaction stands.
        self._told = True
        #: The messages that the body sends: recorded in the transaction, published by whoever learns that it has committed.
        self.outbox: Outbox = _BodysOutbox(self, queue_log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self.roll_back(broken=error is not None and not isinstance(error, Exception))

    # -- for the body --------------------------------------------------------------------------------------------------

    @property
    def connection(self) -> Connection:
        """The connection, in the transaction.

        Raises:
            IdempotentError: The transaction is over.
        """
        if self._over:
            raise IdempotentError(
                "the transaction of this atomic body is over: the body retried or replaced itself, and the rest of it has none"
            )
        return self._connection or self._open()

    @property
    def session(self) -> Session:
        """A session on that connection.

        Raises:
            ConfigurationError: The session factory makes sessions that go elsewhere.
            IdempotentError: The transaction is over.
        """
        connection = self.connection
        if self._session is None:
            session = self._make_session(connection)
            if session.connection() is not connection:
                session.close()
                raise ConfigurationError(
                    "QueueLog(app, session_factory=...) makes sessions that do not keep to the connection they are given (bind=...), "
                    "so what they write would not be committed with the message; give a plain sessionmaker"
                )
            self._session = session
        return self._session

    def connect(self) -> Connection:
        """Return the connection, for a statement of ours: within the savepoint that the session is in, which it sets when it is used."""
        connection = self.connection
        return connection if self._session is None else self._session.connection()

    @property
    def over(self) -> bool:
        """Whether the body goes on without a transaction: it has retried, or replaced itself."""
        return self._over

    # -- for the run ---------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin the transaction now, rather than when the body asks for it.

        Raises:
            StoreUnavailableError: There is no connection to be had for now.
        """
        self.gave_way = self.setback = None
        try:
            self._open()
        except Exception as error:
            if self.setback is Setback.NOT_CONNECTED:
                raise StoreUnavailableError(f"no connection to the store's database: {error}") from error
            raise

    @property
    def begins_before_body(self) -> bool:
        """Whether the transaction has to begin before the body, which writes on a connection that it does not ask for."""
        return self._store.begins_before_body

    @property
    def opened(self) -> bool:
        """Whether there is a transaction: the body has asked for it, and it is not over."""
        return self._connection is not None

    @property
    def store(self) -> Store:
        """The store, with its verbs in the transaction."""
        return self._store.within(self.connection)

    def flush(self) -> None:
        """Write what the session still keeps to itself, as a commit would.

        Raises:
            IdempotentError: The body ended the transaction itself.
            Exception: The database's or the session's own.
        """
        if self.gave_way is not None:
            raise self.gave_way
        if self._connection is None:
            return
        if self._is_ours() and self._session is not None:
            self._session.flush()
        if not self._is_ours():
            raise IdempotentError(
                "the body of an atomic task ended its transaction itself: by rollback() or close(), or by an error of a flush that "
                "it caught; nothing of it is kept. To undo a part use begin_nested(), to undo all of it raise an error"
            )
        self._refuse_given_up(self._connection)

    def commit(self, write: Callable[[Store], bool]) -> bool:
        """Write how the message ended, in the transaction, and commit.

        Args:
            write: A verb of the store it is given; whether the claim still held.

        Returns:
            Whether it did; if not, the transaction was rolled back.

        Raises:
            Exception: Nothing was committed, unless :attr:`in_doubt` is set.
        """
        self.flush()
        if not write(self.store):
            self.roll_back()
            return False
        connection, session = self.connection, self._session
        self._committing = self._over = True
        # By the session, so that what listens to it is told. One that was not used yet has nothing to commit.
        if session is not None and session.in_transaction():
            session.commit()
        transaction = connection.get_transaction()
        if transaction is not None and transaction.is_active:
            transaction.commit()
        self.in_doubt = not self._told
        self.roll_back()  # which closes what is left
        return True

    def roll_back(self, *, broken: bool = False) -> None:
        """End the transaction, if it is not over; nothing of it is kept.

        Args:
            broken: Whether the connection may be in the midst of an answer: it is closed then, and not used again.
        """
        from sqlalchemy.exc import SQLAlchemyError

        if not self._over:  # or a commit may have taken place
            self._over = True
            self.outbox.discard()
        connection, session, undone = self._connection, self._session, self._undone
        self._connection = self._session = None
        if connection is None:
            return
        try:
            if broken:
                connection.invalidate()
            if session is not None and undone:
                session.expunge_all()  # it may be bound to a transaction that is no more
            elif session is not None:
                if session.in_transaction():
                    session.rollback()
                session.close()
        except SQLAlchemyError as error:
            # The connection broke, and its server rolls back by itself.
            logger.debug("a session could not be rolled back: %s", error)
            connection.invalidate()
        try:
            connection.close()
        except SQLAlchemyError as error:
            logger.debug("a connection could not be closed: %s", error)
            connection.invalidate()

    # -- opening -------------------------------------------------------------------------------------------------------

    def _open(self) -> Connection:
        from sqlalchemy.exc import DBAPIError
        from sqlalchemy.exc import TimeoutError as PoolTimeoutError

        engine = self._store.engine
        _listen(engine)
        try:
            connection = engine.connect()
        except (DBAPIError, PoolTimeoutError) as error:  # which belong to no connection, and have done nothing
            self.gave_way, self.setback = error, Setback.NOT_CONNECTED
            raise
        try:
            connection.execution_options(**{_UNIT: self, OUTBOX: self.outbox})
            if self._isolation_level is not None:
                connection.execution_options(isolation_level=self._isolation_level)
            refuse_autocommit(
                connection,
                "atomic=True needs transactions, and the store's engine is in autocommit; "
                "give QueueLog(app, isolation_level=...) another level for atomic tasks",
            )
            connection.begin()
            begin(connection, at_once=self._contended)
            self._store.watch(connection, self.note)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _make_session(self, connection: Connection) -> Session:
        from sqlalchemy.orm import Session

        factory = self._session_factory or Session
        # A scoped session would keep it for the next body of this thread.
        factory = getattr(factory, "session_factory", factory)
        # Its own binds would lead past the connection. What it commits or rolls back, it does to our transaction: and we are told.
        session: Session = factory(bind=connection, binds=None, join_transaction_mode="control_fully")
        if not session.in_transaction():
            session.begin()
        return session

    # -- what the connection tells -------------------------------------------------------------------------------------

    def _is_ours(self) -> bool:
        """Return whether the transaction is still the one that was begun, and can be committed."""
        assert self._connection is not None, "it was opened"
        transaction = self._connection.get_transaction()
        return transaction is not None and transaction.is_active and not self._undone

    def note(self, error: BaseException) -> None:
        """Note an error that a statement has met, if the transaction gave way by it."""
        if self.gave_way is None and self._store.gave_way(error):
            self.gave_way = error
            self.setback = Setback.COLLIDED if self._store.collided(error) else Setback.BROKE

    def _before_commit(self, connection: Connection) -> None:
        if not self._committing:
            raise IdempotentError(
                "the body of an atomic task is committed when it ends, together with its message, and not before: leave commit() out "
                "(with session.begin() too)"
            )
        # The completion is written, but what listens to the session's commit may have failed since.
        self._refuse_given_up(connection)
        self.in_doubt = True

    def _refuse_given_up(self, connection: Connection) -> None:
        given_up = self._store.gave_up(connection)
        self._told = given_up is not None
        if given_up:
            raise given_up_error()

    def _before_rollback(self) -> None:
        self._undone = True


class _BodysOutbox(Outbox):
    """The calls of the body, which are recorded in its transaction."""

    def __init__(self, unit: UnitOfWork, queue_log: QueueLog) -> None:
        super().__init__(unit.connect)
        self._unit = unit
        self._queue_log = queue_log

    def takes(self, queue_log: QueueLog) -> bool:
        return queue_log is self._queue_log and not self._unit.over


# -- events of an engine, which may be its owner's: for all of its connections, those that have no unit included ------------


def _listen(engine: Engine) -> None:
    from sqlalchemy import event

    for name, listener in (("handle_error", _on_error), ("commit", _on_commit), ("rollback", _on_rollback)):
        if not event.contains(engine, name, listener):
            event.listen(engine, name, listener)


def _unit_of(connection: Connection | None) -> UnitOfWork | None:
    return None if connection is None else connection.get_execution_options().get(_UNIT)


def _on_error(context: ExceptionContext) -> None:
    unit = _unit_of(context.connection)
    if unit is not None and context.sqlalchemy_exception is not None:
        unit.note(context.sqlalchemy_exception)


def _on_commit(connection: Connection) -> None:
    unit = _unit_of(connection)
    if unit is not None:
        unit._before_commit(connection)  # noqa: SLF001


def _on_rollback(connection: Connection) -> None:
    unit = _unit_of(connection)
    if unit is not None:
        unit._before_rollback()  # noqa: SLF001
