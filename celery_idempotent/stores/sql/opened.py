"""The engines that one process has opened on a database."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sqlalchemy import URL, Connection, Engine, Pool, StaticPool
from sqlalchemy.exc import DBAPIError

from celery_idempotent.core.fork_lock import no_fork
from celery_idempotent.errors import ConfigurationError, IdempotentError
from celery_idempotent.stores.faults import unavailable
from celery_idempotent.stores.sql.dialects import Dialect
from celery_idempotent.stores.sql.direct import DirectConnection, Plans
from celery_idempotent.stores.sql.engines import beside, close, follow, for_statements, for_transactions
from celery_idempotent.stores.sql.watch import Watch

__all__ = ["Opened"]

#: How much longer we wait for an answer than the server may work on the statement. Until then it has given up, or was asked to.
_WAIT = 1.25

#: The errors of opening an engine or a connection.
_AT_OPENING = (TypeError, ValueError, DBAPIError, OSError)


class Opened:
    """What one process has opened; each engine lazily.

    Args:
        target: A URL, or a user's engine.
        dialect: The strategy for the database.
        name: Its name in errors.
        limit: Seconds for which the server works on a statement of the store's.
        inherited: In a forked process: where to keep the pool that a user's engine inherited from the parent.
    """

    def __init__(
        self, target: URL | Engine, dialect: Dialect, *, name: str, limit: float, inherited: list[Pool] | None
    ) -> None:
        self._target = target
        self._dialect = dialect
        self._name = name
        self._inherited = inherited
        self._lock = threading.RLock()
        self._for_statements: Engine | None = None
        self._for_transactions: Engine | None = None
        self._turn: AbstractContextManager[Any] = nullcontext()
        self._plans = Plans()
        self.limit = limit
        self.watch = Watch(_WAIT * limit)
        #: Whether the table was checked.
        self.ready = False

    @property
    def for_statements(self) -> Engine:
        """An engine in autocommit, for the store's own statements."""
        if self._for_statements is None:
            with self._lock:
                if self._for_statements is None:
                    try:
                        self._for_statements = self._open_for_statements()
                    except _AT_OPENING as error:
                        self._explain(error)
                        raise
        return self._for_statements

    @property
    def for_transactions(self) -> Engine:
        """An engine for users' transactions: the user's own, if given."""
        with self._lock:
            if self._for_transactions is None:
                self._for_transactions = self._open_for_transactions(self.for_statements)
            return self._for_transactions

    def turn(self) -> AbstractContextManager[Any]:
        """Return the lock of an operation: an in-memory SQLite database has one connection. With a file, forks have to wait."""
        _ = self.for_statements  # by which that is known
        return self._turn

    def connect(self) -> Connection:
        """Return a connection for the store's own statements."""
        engine = self.for_statements
        try:
            # A user's engine has the user's events, and gets autocommit connection by connection.
            return DirectConnection(engine, self._plans) if self.is_ours(engine) else engine.connect()
        except _AT_OPENING as error:
            self._explain(error)
            raise

    def is_ours(self, engine: Engine) -> bool:
        """Return whether an engine is the store's own, and not the user's or a proxy of it."""
        return not isinstance(self._target, Engine) or engine.pool is not self._target.pool

    def close(self) -> None:
        """Close the store's own connections, and end the thread that watches them."""
        self.watch.rest()
        for engine in (self._for_statements, self._for_transactions):
            if engine is not None and self.is_ours(engine):
                close(engine)

    def _open_for_statements(self) -> Engine:
        if isinstance(self._target, Engine):
            if self._inherited is not None:
                self._inherited.append(self._target.pool)
                self._target.dispose(close=False)
            own = beside(self._target, self._dialect, self.limit)
            engine = self._dialect.in_autocommit(self._target) if own is None else own
        else:
            engine = for_statements(self._target, self._dialect, self.limit)
        if isinstance(engine.pool, StaticPool):
            self._turn = self._lock
        elif engine.dialect.name == "sqlite":
            self._turn = no_fork()
        return engine

    def _open_for_transactions(self, statements: Engine) -> Engine:
        if isinstance(self._target, Engine):
            follow(self._target)
            return self._target
        if isinstance(statements.pool, StaticPool):
            return statements.execution_options(isolation_level="SERIALIZABLE")
        # A separate pool: bodies that hold a connection for minutes must not keep a lease from being renewed.
        return for_transactions(self._target, self._dialect)

    def _explain(self, error: Exception) -> None:
        """Raise an error that names the problem with the URL, or with this host, if it is known."""
        match error:
            case IdempotentError():
                return
            case OSError():  # of this host, such as too many open files
                raise unavailable(f"the queue log at {self._name} cannot be opened: {error}", sent=False) from error
            case TypeError() | ValueError():  # an option in the URL that the driver does not know
                why = str(error)
            case DBAPIError() if "invalid connection option" in str(error.orig):  # libpq's words
                why = " ".join(str(error.orig).split())
            case _:
                return
        raise ConfigurationError(
            f"the queue log at {self._name} cannot be opened, its URL has a wrong option: {why}"
        ) from error
