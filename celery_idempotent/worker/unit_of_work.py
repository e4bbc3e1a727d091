"""The transaction of an atomic body: what the body writes, and how it ended, take effect together or not at all.

A unit of work belongs to one run of one body. Its connection is opened when the body first asks for it, and is none of the store's:
leases are renewed beside it. Whoever runs the body (:mod:`celery_idempotent.worker.perform`) ends the unit: by the write that ends the
message, in the same transaction, or by rolling back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from celery_idempotent.core.begin import begin
from celery_idempotent.core.transactions import refuse_autocommit, transactional
from celery_idempotent.errors import ConfigurationError, IdempotentError, StoreUnavailableError
from celery_idempotent.producer.box import OUTBOX, Outbox
from celery_idempotent.worker.transaction_watch import Phase, Setback, TransactionWatch

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from celery_idempotent.core.store import Store
    from celery_idempotent.queue_log import QueueLog

__all__ = ["RUNS", "NotCommittedError", "UnitOfWork"]

logger = logging.getLogger("celery_idempotent")

#: How often a body is run at most whose transaction gave way to another one (a deadlock, a serialization failure, a lock that was
#: waited for in vain), or whose connection broke, or could not be had.
RUNS = 5


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
        #: How the transaction goes.
        self.watch = TransactionWatch(self._store)
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
        self.watch = TransactionWatch(self._store)
        try:
            self._open()
        except Exception as error:
            if self.watch.setback is Setback.NOT_CONNECTED:
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
        if self.watch.gave_way is not None:
            raise self.watch.gave_way
        if self._connection is None:
            return
        if self._session is not None and self.watch.is_intact(self._connection):
            self._session.flush()
        self.watch.refuse_ended(self._connection)

    def commit(self, write: Callable[[Store], bool]) -> bool:
        """Write how the message ended, in the transaction, and commit.

        Args:
            write: A verb of the store it is given; whether the claim still held.

        Returns:
            Whether it did; if not, the transaction was rolled back.

        Raises:
            Exception: Nothing was committed, unless the watch says ``in_doubt``.
        """
        self.flush()
        if not write(self.store):
            self.roll_back()
            return False
        connection, session = self.connection, self._session
        self.watch.phase, self._over = Phase.COMMITTING, True
        # By the session, so that what listens to it is told. One that was not used yet has nothing to commit.
        if session is not None and session.in_transaction():
            session.commit()
        transaction = connection.get_transaction()
        if transaction is not None and transaction.is_active:
            transaction.commit()
        self.watch.committed()
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
        connection, session, undone = self._connection, self._session, self.watch.rolled_back
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
        try:
            connection = engine.connect()
        except (DBAPIError, PoolTimeoutError) as error:  # which belong to no connection, and have done nothing
            self.watch.gave_way, self.watch.setback = error, Setback.NOT_CONNECTED
            raise
        try:
            self.watch.watch(connection)
            connection.execution_options(**{OUTBOX: self.outbox})
            if self._isolation_level is not None:
                connection.execution_options(isolation_level=self._isolation_level)
            refuse_autocommit(
                connection,
                "atomic=True needs transactions, and the store's engine is in autocommit; "
                "give QueueLog(app, isolation_level=...) another level for atomic tasks",
            )
            connection.begin()
            begin(connection, at_once=self._contended)
            self._store.watch(connection, self.watch.on_error)
            self.watch.phase = Phase.IN_BODY
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


class _BodysOutbox(Outbox):
    """The calls of the body, which are recorded in its transaction."""

    def __init__(self, unit: UnitOfWork, queue_log: QueueLog) -> None:
        super().__init__(unit.connect)
        self._unit = unit
        self._queue_log = queue_log

    def takes(self, queue_log: QueueLog) -> bool:
        return queue_log is self._queue_log and not self._unit.over
