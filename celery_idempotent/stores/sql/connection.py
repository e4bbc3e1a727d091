"""Connections: one pool per process, one round trip per statement, and what to do when the database does not answer.

Every statement of the store stands on its own, so connections are in autocommit: no ``BEGIN``, ``COMMIT`` or ``ROLLBACK``
travels around it, and no ping before it. A pooled connection that its server has closed meanwhile is told by its socket, without
a round trip. One that breaks under a statement has the statement repeated once on a fresh one; what an operation does on such a
repeat is its own matter (its ``is_retry``), because the first attempt may have taken effect. A server that does not answer at all is
worked on for longer than :data:`ANSWER`, and what is not waited for any more is not left to the server.
"""

# Longer than most: how one connection is had, watched, repeated and given back is one story.

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, Pool, StaticPool
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from celery_idempotent.core.backoff import Backoff
from celery_idempotent.core.fork_lock import no_fork
from celery_idempotent.errors import (
    AccessDeniedError,
    ConfigurationError,
    IdempotentError,
    SchemaError,
    StoreError,
    StoreUnavailableError,
)
from celery_idempotent.stores.sql.address import masked
from celery_idempotent.stores.sql.dialects import Dialect, Fault
from celery_idempotent.stores.sql.direct import DirectConnection, Plans
from celery_idempotent.stores.sql.engines import LIMITED, beside, close, follow, for_statements, for_transactions
from celery_idempotent.stores.sql.watch import Watch, Watched, beside_us

__all__ = ["Database", "Joined"]

T = TypeVar("T")

#: A collision (deadlock, serialization failure, busy) is repeated so often, and not once this many seconds have passed: a
#: lock that was waited for in vain for a minute is not waited for again.
COLLISIONS = 8
PATIENCE = 10.0
_BACKOFF = Backoff(0.01)

#: Seconds for which the server works on a statement of a producer or a consumer; operators' statements may take as long as they need. Far
#: more than an answer takes, and less than a broker waits for a heartbeat.
ANSWER = 20.0

#: How much longer than that an answer is waited for. Until then the server has given up by itself, or was asked to.
_WAIT = 1.25

#: Faults of a transaction that took no effect, and may if all of it is done again.
_GAVE_WAY = {Fault.COLLISION, Fault.LOST, Fault.MOVED}

#: Faults of a database that takes nothing for now.
_TAKES_NOTHING = {Fault.UNAVAILABLE, Fault.DENIED}

#: Seconds for a statement to be cancelled that an exception from elsewhere broke into.
_CANCEL = 2.0


@dataclass(slots=True, eq=False)
class _Opened:
    """What one process has opened."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    autocommit: Engine | None = None
    transactions: Engine | None = None
    #: An in-memory SQLite database is one connection, which its threads take in turn; with a file, so do forks.
    turn: AbstractContextManager[Any] = field(default_factory=nullcontext)
    ready: bool = False
    plans: Plans = field(default_factory=Plans)
    limit: float = field(default_factory=lambda: ANSWER)
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(_WAIT * self.limit)


class Database:
    """A database as the store's operations see it: somewhere to run them.

    Args:
        target: A URL; or an engine, which stays its owner's: it is not disposed of, and atomic bodies are on its connections. The store's
            own statements are on connections that are made as the engine makes them; but where it has no ``QueuePool`` they are on its
            own, too, in autocommit by an execution option. After a fork its inherited pool is dropped, unclosed, as SQLAlchemy asks.
        dialect: What is peculiar to it.
        prepare: Called once per process, on a connection, before the first operation; until it succeeds.
    """

    def __init__(self, target: URL | Engine, dialect: Dialect, prepare: Callable[[Connection], None]) -> None:
        self._target = target
        self._dialect = dialect
        self._prepare = prepare
        self._made_in = os.getpid()
        # By process id: after a fork, what the parent opened is left alone, but referred to, lest the garbage collector
        # closes the parent's connections from the child.
        self._opened: dict[int, _Opened] = {}
        self._inherited_pools: list[Pool] = []

    def __str__(self) -> str:
        return masked(self._url)

    @property
    def _url(self) -> URL:
        return self._target.url if isinstance(self._target, Engine) else self._target

    def exists(self) -> bool:
        """Return whether there is a database to connect to; ``False`` only where connecting would make it."""
        return self._dialect.exists(self._url)

    @property
    def engine(self) -> Engine:
        """An engine for transactions on the same database; its connections are not the autocommit ones.

        The owner's engine where there is one. Opened lazily, per process.
        """
        opened = self._here()
        with opened.lock:
            if opened.transactions is None:
                opened.transactions = self._open_transactions(self._autocommit(opened))
            return opened.transactions

    def of_bodies(self) -> dict[str, str]:
        """How the connections of atomic bodies are set up, as far as that can be wrong: an engine's, which its owner made.

        Raises:
            StoreUnavailableError: No connection.
        """
        if not isinstance(self._target, Engine):
            return {}
        try:
            with self.engine.connect() as connection:
                return self._dialect.setup(connection.connection.dbapi_connection)
        except (DBAPIError, PoolTimeoutError) as error:
            raise _unavailable(f"the engine of the queue log at {self} has no connection: {error}", False) from error

    def run(self, operation: Callable[[Connection, bool], T], *, prepared: bool = True, patient: bool = False) -> T:
        """Run an operation on a connection, repeating it as far as that can help.

        Args:
            operation: Given the connection, and whether an earlier attempt broke off with its connection.
            prepared: Whether the table has to be there; ``False`` for operations that look after it themselves.
            patient: Whether it may take as long as it needs: a person waits for it, and the table may be large.

        Raises:
            StoreUnavailableError: No connection, or it broke twice, or no answer, or collisions did not end.
            SchemaError: A table or column is missing.
            StoreError: Any other error of the database, which repeating would not change.
        """
        is_retry = inspected = moved = False
        collisions = 0
        began = time.monotonic()
        while True:
            try:
                return self._attempt(operation, is_retry, prepared, patient)
            except PoolTimeoutError as error:
                raise _unavailable(
                    f"the queue log at {self}: every connection is in use ({error})", is_retry
                ) from error
            except UnicodeError as error:
                raise StoreError(f"the queue log at {self} refused: {error}") from error
            except DBAPIError as error:
                fault = self._dialect.fault(error)
                # An error that belongs to no statement is one of connecting.
                lost = fault is Fault.LOST and error.statement is not None
                if lost and not is_retry:
                    is_retry = True
                elif fault is Fault.COLLISION and collisions < COLLISIONS and time.monotonic() - began < PATIENCE:
                    collisions += 1
                    time.sleep(_BACKOFF.random_pause(collisions))
                elif fault is Fault.MOVED and not moved:
                    moved = True  # its connection was thrown away, and the next may lead to where the primary is now
                elif fault is Fault.SCHEMA and not inspected:
                    # The table is not what it was when it was looked at. Looking again says what is missing.
                    inspected = True
                    self._here().ready = False
                else:
                    raise self._explained(fault, error, is_retry) from error

    def join(self, connection: Connection) -> Joined:
        """Somebody's transaction on this database, as the store's operations see it.

        Raises:
            ConfigurationError: It is a connection to another kind of database.
            SchemaError: The table is not there.
        """
        if connection.dialect.name not in self._dialect.names:
            raise ConfigurationError(
                f"the queue log is at {self}, and a {connection.dialect.name} connection does not lead there: "
                f"take a session on the store's own database"
            )
        if not self._here().ready:
            # In the transaction: another connection could not make SQLite's table while this one writes.
            self._prepare(connection)
        return Joined(connection, self._dialect, str(self))

    def gave_way(self, error: BaseException) -> bool:
        """Return whether a transaction that met an error took no effect, and may if it is repeated."""
        if not isinstance(error, DBAPIError):
            return False
        fault = self._dialect.fault(error)
        # That a statement took too long is the body's own affair; that the database takes nothing for now is not.
        return fault in _GAVE_WAY or (fault in _TAKES_NOTHING and not self._dialect.timed_out(error))

    def collided(self, error: BaseException) -> bool:
        """Return whether it did so in favour of another one."""
        return isinstance(error, DBAPIError) and self._dialect.fault(error) is Fault.COLLISION

    def close(self) -> None:
        """Close this process's own connections. The next operation opens new ones."""
        opened = self._opened.pop(os.getpid(), None)
        for engine in () if opened is None else (opened.autocommit, opened.transactions):
            if engine is not None and self._is_ours(engine):
                close(engine)

    def _attempt(self, operation: Callable[[Connection, bool], T], is_retry: bool, prepared: bool, patient: bool) -> T:
        opened = self._here()
        self._autocommit(opened)  # before its turn is taken, which is known when it is open
        with (
            opened.turn,
            self._connect(opened) as connection,
            self._alone(connection),
            self._bounded(opened, connection, patient) as watched,
        ):
            try:
                if prepared and not opened.ready:
                    self._prepare(connection)
                    opened.ready = True
                return operation(connection, is_retry)
            except DBAPIError as error:
                if watched is not None and watched.cut:
                    # Not repeated, as a connection that broke is: the server is there, and had its time.
                    raise StoreUnavailableError(self._no_answer(opened)) from error
                if self._dialect.fault(error) is Fault.MOVED:
                    connection.invalidate(error)
                    if self._is_ours(connection.engine):
                        connection.engine.dispose()  # its siblings most likely lead there as well
                raise
            except IdempotentError:
                raise
            except BaseException:
                # Celery's soft time limit and the like are raised by signal, perhaps in the middle of an answer: whoever
                # used this connection next would read the rest of it.
                self._abandon(connection)
                raise

    def _connect(self, opened: _Opened) -> Connection:
        engine = self._autocommit(opened)
        with self._opening():
            # An engine of somebody's own has events of theirs, and is put into autocommit connection by connection.
            return DirectConnection(engine, opened.plans) if self._is_ours(engine) else engine.connect()

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Name what is wrong with the URL, or with this host, where an engine or a connection is opened."""
        try:
            yield
        except (TypeError, ValueError) as error:
            if isinstance(error, IdempotentError):
                raise
            # An option of the URL, which some drivers take for an argument of their own.
            raise ConfigurationError(
                f"the queue log at {self} cannot be opened, its URL has a wrong option: {error}"
            ) from error
        except DBAPIError as error:
            if "invalid connection option" not in str(error.orig):  # libpq's words
                raise
            raise ConfigurationError(
                f"the queue log at {self} cannot be opened, its URL has a wrong option: {' '.join(str(error.orig).split())}"
            ) from error
        except OSError as error:  # of this host, such as too many open files
            raise _unavailable(f"the queue log at {self} cannot be opened: {error}", False) from error

    def _alone(self, connection: Connection) -> AbstractContextManager[None]:
        """Have each statement stand for itself, whatever listeners make of a transaction."""
        quiet = isinstance(connection, DirectConnection) and not connection.watched
        return nullcontext() if quiet else self._dialect.autocommit(connection)

    def _bounded(
        self, opened: _Opened, connection: Connection, patient: bool
    ) -> AbstractContextManager[Watched | None]:
        """Whatever is asked of the connection is answered in time, or it is cut; unless a person waits for it."""
        if patient:
            return self._dialect.unlimited(connection) if LIMITED in connection.info else nullcontext()
        descriptor = self._dialect.socket(connection.connection.dbapi_connection)
        if descriptor is None:
            return nullcontext()
        try:
            return opened.watch.over(descriptor, partial(self._cancel, connection))
        except OSError as error:
            raise _unavailable(f"the queue log at {self} cannot be asked: {error}", False) from error

    def _cancel(self, connection: Connection) -> None:
        pool = connection.engine.pool
        cancel = self._dialect.cancel(connection.connection.dbapi_connection, lambda: pool.recreate().connect())
        if cancel is not None:
            cancel()

    def _abandon(self, connection: Connection) -> None:
        """Give a connection up that may be in the middle of an answer, and have the server give up what it works on."""
        if not connection.invalidated:
            asking = beside_us(partial(self._cancel, connection))
            if asking.is_alive():
                asking.join(_CANCEL)
        connection.invalidate()

    def _no_answer(self, opened: _Opened) -> str:
        return f"the queue log at {self} gave no answer within {opened.limit:g} s"

    def _is_ours(self, engine: Engine) -> bool:
        """Return whether an engine is the store's own; its owner's is a proxy of it, or itself."""
        return not isinstance(self._target, Engine) or engine.pool is not self._target.pool

    def _here(self) -> _Opened:
        """Return what this process has opened. Without a lock, which a fork could have left locked; ``setdefault`` is atomic."""
        return self._opened.get(os.getpid()) or self._opened.setdefault(os.getpid(), _Opened())

    def _autocommit(self, opened: _Opened) -> Engine:
        if opened.autocommit is None:
            with opened.lock:
                if opened.autocommit is None:
                    with self._opening():
                        opened.autocommit = self._open_autocommit(opened)
        return opened.autocommit

    def _open_autocommit(self, opened: _Opened) -> Engine:
        if isinstance(self._target, Engine):
            if self._made_in != os.getpid():
                self._inherited_pools.append(self._target.pool)
                self._target.dispose(close=False)
            own = beside(self._target, self._dialect, opened.limit)
            engine = self._dialect.in_autocommit(self._target) if own is None else own
        else:
            engine = for_statements(self._target, self._dialect, opened.limit)
        if isinstance(engine.pool, StaticPool):
            opened.turn = opened.lock
        elif engine.dialect.name == "sqlite":
            opened.turn = no_fork()
        return engine

    def _open_transactions(self, autocommit: Engine) -> Engine:
        if isinstance(self._target, Engine):
            follow(self._target)
            return self._target
        if isinstance(autocommit.pool, StaticPool):
            return autocommit.execution_options(isolation_level="SERIALIZABLE")
        # A pool of its own: bodies that hold a connection for minutes must not keep a lease from being renewed.
        return for_transactions(self._target, self._dialect)

    def _explained(self, fault: Fault, error: DBAPIError, sent: bool) -> StoreError:
        cause = " ".join(str(error.orig).split())
        match fault:
            case Fault.SCHEMA:
                return SchemaError(f"the queue log at {self}: {cause}; run `celery -A proj idempotent init`")
            case Fault.UNAVAILABLE if self._dialect.timed_out(error):
                return _unavailable(f"{self._no_answer(self._here())}: {cause}", sent)
            case Fault.DENIED:
                return _unavailable(f"the queue log at {self} refused: {cause}", sent, AccessDeniedError)
            case Fault.OTHER:
                return StoreError(f"the queue log at {self} refused: {cause}")
            case _:
                return _unavailable(f"the queue log at {self} gave no answer: {cause}", sent)


class Joined:
    """A transaction of the caller's, as the store's operations see it: they run in it once, for better or worse."""

    def __init__(self, connection: Connection, dialect: Dialect, name: str) -> None:
        self._connection = connection
        self._dialect = dialect
        self._name = name

    def run(self, operation: Callable[[Connection, bool], T], *, prepared: bool = True, patient: bool = False) -> T:  # noqa: ARG002
        """Run an operation; see :meth:`Database.run`.

        Raises:
            SchemaError: The table is not where this connection leads.
            sqlalchemy.exc.DBAPIError: Any other error of the database.
        """
        try:
            return operation(self._connection, False)
        except DBAPIError as error:
            if self._dialect.fault(error) is Fault.SCHEMA:
                raise SchemaError(
                    f"the table of the queue log is not in the database of this transaction, {masked(self._connection.engine.url)}: "
                    f"take a session on the database of the store, {self._name}"
                ) from error
            raise


def _unavailable(
    text: str, sent: bool, kind: type[StoreUnavailableError] = StoreUnavailableError
) -> StoreUnavailableError:
    error = kind(text)
    error.unsent = not sent
    return error
