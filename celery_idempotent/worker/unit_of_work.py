"""The transaction of an atomic body: its writes and the message's completion take effect together or not at all.

A unit of work belongs to one run of one body. It opens its connection when the body first asks for it. The store renews leases on other
connections. :mod:`celery_idempotent.worker.perform` runs the body and ends the unit: it writes the message's end in the same transaction
and commits, or rolls back.
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

#: How often a body runs at most if its transaction gives way to another (a deadlock, a serialization failure, a lock wait
#: timeout), or its connection breaks or cannot be opened.
RUNS = 5


class NotCommittedError(Exception):
    """A body's transaction was not committed. Never leaves the run.

    Args:
        error: Why.
        again: Whether the body may run again after it.
    """

    def __init__(self, error: Exception, *, again: bool) -> None:
        super().__init__(error)
        self.error = error
        self.again = again


class UnitOfWork:
    """The transaction of one body.

    Args:
        queue_log: Its store's database, session factory and isolation level are used.
        contended: Whether an earlier run of the body gave way to another transaction.

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
        #: The state of the transaction.
        self.watch = TransactionWatch(self._store)
        #: The messages that the body sends: recorded in the transaction, published after its commit.
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
            ConfigurationError: The session factory's sessions use another connection.
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
        """Return the connection for our own statements. Getting it from the session sets the savepoint that the session is in."""
        connection = self.connection
        return connection if self._session is None else self._session.connection()

    @property
    def over(self) -> bool:
        """Whether the transaction has ended. A body that has retried or replaced itself goes on without one."""
        return self._over

    # -- for the run ---------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin the transaction now, rather than when the body asks for it.

        Raises:
            StoreUnavailableError: No connection can be opened for now.
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
        """Whether to begin the transaction before the body, because the body does not ask the unit for its connection."""
        return self._store.begins_before_body

    @property
    def opened(self) -> bool:
        """Whether a transaction was begun and is not over."""
        return self._connection is not None

    @property
    def store(self) -> Store:
        """The store, with its verbs in the transaction."""
        return self._store.within(self.connection)

    def flush(self) -> None:
        """Flush the session, as a commit would.

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
            write: Calls a verb of the store it is given, and returns whether the claim still held.

        Returns:
            Whether the claim still held; if not, the transaction was rolled back.

        Raises:
            Exception: Nothing was committed, unless the watch says ``in_doubt``.
        """
        self.flush()
        if not write(self.store):
            self.roll_back()
            return False
        connection, session = self.connection, self._session
        self.watch.phase, self._over = Phase.COMMITTING, True
        # Commit by the session, so that its event listeners run. A session not used yet has nothing to commit.
        if session is not None and session.in_transaction():
            session.commit()
        transaction = connection.get_transaction()
        if transaction is not None and transaction.is_active:
            transaction.commit()
        self.watch.committed()
        self.roll_back()  # closes the session and the connection
        return True

    def roll_back(self, *, broken: bool = False) -> None:
        """Roll the transaction back if it is not over; close the session and the connection.

        Args:
            broken: Whether the connection may be in the middle of an answer; it is then closed and not used again.
        """
        from sqlalchemy.exc import SQLAlchemyError

        if not self._over:  # else the commit may have succeeded, and the outbox is still needed
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
                session.expunge_all()  # it may be bound to a transaction that has ended
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
        except (DBAPIError, PoolTimeoutError) as error:  # no connection was opened, so nothing was done
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
        # A scoped session would keep the session for this thread's next body.
        factory = getattr(factory, "session_factory", factory)
        # The factory's own binds would bypass the connection. A commit or rollback by the session ends our transaction, and the watch sees it.
        session: Session = factory(bind=connection, binds=None, join_transaction_mode="control_fully")
        if not session.in_transaction():
            session.begin()
        return session


class _BodysOutbox(Outbox):
    """The body's calls, recorded in its transaction."""

    def __init__(self, unit: UnitOfWork, queue_log: QueueLog) -> None:
        super().__init__(unit.connect)
        self._unit = unit
        self._queue_log = queue_log

    def takes(self, queue_log: QueueLog) -> bool:
        return queue_log is self._queue_log and not self._unit.over
