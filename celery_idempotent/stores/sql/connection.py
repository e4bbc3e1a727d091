"""Connections: one round trip per statement, and what to do when the database does not answer.

Each statement of the store is a transaction by itself, so connections are in autocommit: no ``BEGIN``, ``COMMIT`` or ``ROLLBACK`` is sent
around it, and no ping before it. If a connection breaks under a statement, the statement is repeated once on a fresh one. What a verb does on such a
repeat is up to the verb (:attr:`Attempt.is_retry`), because the first attempt may have taken effect. A server works on a statement for
:data:`ANSWER` seconds at most: when we stop waiting, it stops working too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from sqlalchemy import URL, Connection, Engine, Pool
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from celery_idempotent.core.backoff import Backoff
from celery_idempotent.errors import (
    AccessDeniedError,
    ConfigurationError,
    IdempotentError,
    SchemaError,
    StoreError,
    StoreUnavailableError,
)
from celery_idempotent.stores.faults import unavailable
from celery_idempotent.stores.sql.address import masked
from celery_idempotent.stores.sql.dialects import Dialect, Fault
from celery_idempotent.stores.sql.direct import DirectConnection
from celery_idempotent.stores.sql.engines import LIMITED
from celery_idempotent.stores.sql.opened import Opened
from celery_idempotent.stores.sql.watch import Watched, beside_us

__all__ = ["Attempt", "Database", "Joined"]

T = TypeVar("T")

#: How often a collision (deadlock, serialization failure, busy) is repeated at most, and for how many seconds: after a minute of
#: waiting for a lock, give up.
COLLISIONS = 8
PATIENCE = 10.0
_BACKOFF = Backoff(0.01)

#: Seconds for which the server works on a statement of a producer or a consumer; operators' statements may take as long as they need. Far
#: more than an answer takes, and less than a broker waits for a heartbeat.
ANSWER = 20.0

#: Faults of a transaction that took no effect, but may do so if it is repeated as a whole.
_GAVE_WAY = {Fault.COLLISION, Fault.LOST, Fault.MOVED}

#: Faults of a database that accepts nothing for now.
_TAKES_NOTHING = {Fault.UNAVAILABLE, Fault.DENIED}

#: Seconds for the server to cancel a statement that a signal interrupted.
_CANCEL = 2.0


@dataclass(slots=True)
class Attempt:
    """One attempt at a verb.

    Attributes:
        connection: What the verb's statements are executed on.
        is_retry: Whether an earlier attempt broke off with its connection: it may have taken effect.
        in_transaction: Whether the connection is in a transaction of the caller's.
    """

    connection: Connection
    is_retry: bool = False
    in_transaction: bool = False


class Database:
    """A database as the store's verbs see it: somewhere to run them.

    Args:
        target: A URL; or an engine, which stays its owner's: it is not disposed of, and atomic bodies are on its connections. The store's
            own statements are on connections that are made as the engine makes them; but where it has no ``QueuePool`` they are on its
            own, too, in autocommit by an execution option. After a fork its inherited pool is dropped, unclosed, as SQLAlchemy asks.
        dialect: What is peculiar to it.
        prepare: Called once per process, on a connection, before the first verb; until it succeeds.
    """

    def __init__(self, target: URL | Engine, dialect: Dialect, prepare: Callable[[Connection], None]) -> None:
        self._target = target
        self.dialect = dialect
        self._prepare = prepare
        self._made_in = os.getpid()
        # By process id. After a fork, what the parent opened is left alone, but kept: otherwise the garbage collector of the child
        # would close the parent's connections.
        self._opened: dict[int, Opened] = {}
        self._inherited_pools: list[Pool] = []

    def __str__(self) -> str:
        return masked(self._url)

    @property
    def _url(self) -> URL:
        return self._target.url if isinstance(self._target, Engine) else self._target

    @property
    def in_memory(self) -> bool:
        """Whether it is an in-memory SQLite database."""
        name = self._url.database or ""
        return "sqlite" in self.dialect.names and (name in ("", ":memory:") or "mode=memory" in name)

    @property
    def is_shared(self) -> bool:
        """Whether an engine was given."""
        return isinstance(self._target, Engine)

    def exists(self) -> bool:
        """Return whether there is a database to connect to; ``False`` only where connecting would make it."""
        return self.dialect.exists(self._url)

    @property
    def engine(self) -> Engine:
        """An engine for transactions on the same database; its connections are not the autocommit ones.

        The owner's engine where there is one. Opened lazily, per process.
        """
        return self._here().for_transactions

    def of_bodies(self) -> dict[str, str]:
        """Return the settings of the connections of atomic bodies, which can be wrong if the user made the engine.

        Raises:
            StoreUnavailableError: No connection.
        """
        if not isinstance(self._target, Engine):
            return {}
        try:
            with self.engine.connect() as connection:
                return self.dialect.setup(connection.connection.dbapi_connection)
        except (DBAPIError, PoolTimeoutError) as error:
            raise unavailable(
                f"the engine of the queue log at {self} has no connection: {error}", sent=False
            ) from error

    def run(self, operation: Callable[[Attempt], T], *, prepared: bool = True, patient: bool = False) -> T:
        """Run an operation on a connection, and repeat it as far as that can help.

        Args:
            operation: What to do in an attempt.
            prepared: Whether the table must exist; ``False`` for operations that check this themselves.
            patient: Whether there is no time limit: a person waits for it, and the table may be large.

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
                raise unavailable(
                    f"the queue log at {self}: every connection is in use ({error})", sent=is_retry
                ) from error
            except UnicodeError as error:
                raise StoreError(f"the queue log at {self} refused: {error}") from error
            except DBAPIError as error:
                fault = self.dialect.fault(error)
                # An error without a statement came from connecting.
                lost = fault is Fault.LOST and error.statement is not None
                if lost and not is_retry:
                    is_retry = True
                elif fault is Fault.COLLISION and collisions < COLLISIONS and time.monotonic() - began < PATIENCE:
                    collisions += 1
                    time.sleep(_BACKOFF.random_pause(collisions))
                elif fault is Fault.MOVED and not moved:
                    moved = True  # its connection was dropped; the next may lead to the new primary
                elif fault is Fault.SCHEMA and not inspected:
                    # The table has changed since it was checked. Another check says what is missing.
                    inspected = True
                    self._here().ready = False
                else:
                    raise self._explained(fault, error, is_retry) from error

    def join(self, connection: Connection) -> Joined:
        """Return a caller's transaction on this database, as the store's verbs see it.

        Raises:
            ConfigurationError: It is a connection to another kind of database.
            SchemaError: The table is not there.
        """
        if connection.dialect.name not in self.dialect.names:
            raise ConfigurationError(
                f"the queue log is at {self}, and a {connection.dialect.name} connection does not lead there: "
                f"take a session on the store's own database"
            )
        if not self._here().ready:
            # In the transaction: another connection could not create SQLite's table while this one writes.
            self._prepare(connection)
        return Joined(connection, self.dialect, str(self))

    def gave_way(self, error: BaseException) -> bool:
        """Return whether a transaction that met an error took no effect, and may if it is repeated."""
        if not isinstance(error, DBAPIError):
            return False
        fault = self.dialect.fault(error)
        # A statement that took too long is a fault of the body; a database that accepts nothing is not.
        return fault in _GAVE_WAY or (fault in _TAKES_NOTHING and not self.dialect.timed_out(error))

    def collided(self, error: BaseException) -> bool:
        """Return whether it gave way to another transaction."""
        return isinstance(error, DBAPIError) and self.dialect.fault(error) is Fault.COLLISION

    def close(self) -> None:
        """Close this process's own connections. The next operation opens new ones."""
        opened = self._opened.pop(os.getpid(), None)
        if opened is not None:
            opened.close()

    def _attempt(self, operation: Callable[[Attempt], T], is_retry: bool, prepared: bool, patient: bool) -> T:
        opened = self._here()
        with (
            opened.turn(),
            opened.connect() as connection,
            self._alone(connection),
            self._bounded(opened, connection, patient) as watched,
        ):
            try:
                if prepared and not opened.ready:
                    self._prepare(connection)
                    opened.ready = True
                return operation(Attempt(connection, is_retry))
            except DBAPIError as error:
                if watched is not None and watched.cut:
                    # No repeat, unlike after a broken connection: the server is there, and had its time.
                    raise StoreUnavailableError(self._no_answer(opened)) from error
                if self.dialect.fault(error) is Fault.MOVED:
                    connection.invalidate(error)
                    if opened.is_ours(connection.engine):
                        connection.engine.dispose()  # the pool's other connections most likely lead there as well
                raise
            except IdempotentError:
                raise
            except BaseException:
                # Celery's soft time limit and the like are raised by a signal, perhaps in the middle of an answer: the
                # next user of this connection would read the rest of it.
                self._abandon(connection)
                raise

    def _alone(self, connection: Connection) -> AbstractContextManager[None]:
        """Make each statement a transaction by itself, even if listeners begin one."""
        quiet = isinstance(connection, DirectConnection) and not connection.watched
        return nullcontext() if quiet else self.dialect.autocommit(connection)

    def _bounded(self, opened: Opened, connection: Connection, patient: bool) -> AbstractContextManager[Watched | None]:
        """Cut the connection if its server does not answer in time, unless a person waits for the answer."""
        if patient:
            return self.dialect.unlimited(connection) if LIMITED in connection.info else nullcontext()
        descriptor = self.dialect.socket(connection.connection.dbapi_connection)
        if descriptor is None:
            return nullcontext()
        try:
            return opened.watch.over(descriptor, partial(self._cancel, connection))
        except OSError as error:
            raise unavailable(f"the queue log at {self} cannot be asked: {error}", sent=False) from error

    def _cancel(self, connection: Connection) -> None:
        pool = connection.engine.pool
        cancel = self.dialect.cancel(connection.connection.dbapi_connection, lambda: pool.recreate().connect())
        if cancel is not None:
            cancel()

    def _abandon(self, connection: Connection) -> None:
        """Give up a connection that may be in the middle of an answer, and have its server give up the statement."""
        if not connection.invalidated:
            asking = beside_us(partial(self._cancel, connection))
            if asking.is_alive():
                asking.join(_CANCEL)
        connection.invalidate()

    def _no_answer(self, opened: Opened) -> str:
        return f"the queue log at {self} gave no answer within {opened.limit:g} s"

    def _here(self) -> Opened:
        """Return what this process has opened. Without a lock, which a fork could have left locked; ``setdefault`` is atomic."""
        return self._opened.get(os.getpid()) or self._opened.setdefault(os.getpid(), self._open())

    def _open(self) -> Opened:
        inherited = None if self._made_in == os.getpid() else self._inherited_pools
        return Opened(self._target, self.dialect, name=str(self), limit=ANSWER, inherited=inherited)

    def _explained(self, fault: Fault, error: DBAPIError, sent: bool) -> StoreError:
        cause = " ".join(str(error.orig).split())
        match fault:
            case Fault.SCHEMA:
                return SchemaError(f"the queue log at {self}: {cause}; run `celery -A proj idempotent init`")
            case Fault.UNAVAILABLE if self.dialect.timed_out(error):
                return unavailable(f"{self._no_answer(self._here())}: {cause}", sent=sent)
            case Fault.DENIED:
                return unavailable(f"the queue log at {self} refused: {cause}", sent=sent, kind=AccessDeniedError)
            case Fault.OTHER:
                return StoreError(f"the queue log at {self} refused: {cause}")
            case _:
                return unavailable(f"the queue log at {self} gave no answer: {cause}", sent=sent)


class Joined:
    """A caller's transaction. Verbs run in it once, and nothing is repeated."""

    def __init__(self, connection: Connection, dialect: Dialect, name: str) -> None:
        self._connection = connection
        self._dialect = dialect
        self._name = name

    def run(self, operation: Callable[[Attempt], T], *, prepared: bool = True, patient: bool = False) -> T:  # noqa: ARG002
        """Run an operation; see :meth:`Database.run`.

        Raises:
            SchemaError: The table is not in this connection's database.
            sqlalchemy.exc.DBAPIError: Any other error of the database.
        """
        try:
            return operation(Attempt(self._connection, in_transaction=True))
        except DBAPIError as error:
            if self._dialect.fault(error) is Fault.SCHEMA:
                raise SchemaError(
                    f"the table of the queue log is not in the database of this transaction, {masked(self._connection.engine.url)}: "
                    f"take a session on the database of the store, {self._name}"
                ) from error
            raise
