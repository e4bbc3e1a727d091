"""The strategy that each database fills in."""

# ruff: noqa: ARG002, D102 - documented where they are abstract

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from typing import Any, ClassVar

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    CursorResult,
    Engine,
    Executable,
    PoolProxiedConnection,
    Select,
    Table,
    Update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError

from celery_idempotent.core.store import TransactionStatus

__all__ = ["Dialect", "Fault", "OnConflict"]


class Fault(Enum):
    """What a database error means for the operation that met it."""

    LOST = auto()  # the connection broke: the statement may have taken effect
    COLLISION = auto()  # deadlock, serialization failure, busy: it did not take effect, and may be repeated at once
    UNAVAILABLE = auto()  # it did not take effect, and will not for now
    MOVED = (
        auto()
    )  # it did not take effect: this server takes no writes any more; it may be repeated on another one at once
    DENIED = auto()  # as UNAVAILABLE; the server answered: no such database, or no such account
    SCHEMA = auto()  # a table or column is not there
    OTHER = auto()  # the statement or its data are at fault: repeating it changes nothing


class Dialect(ABC):
    """What one kind of database needs in its statements and connections."""

    #: What SQLAlchemy calls databases of this kind.
    names: ClassVar[tuple[str, ...]]

    #: Whether the table is made on first use: an embedded database needs no set-up.
    creates_table: ClassVar[bool] = False

    @abstractmethod
    def insert(
        self,
        table: Table,
        values: Mapping[str, Any],
        *,
        replaced: Collection[str] = (),
        free: ColumnElement[bool] | None = None,
    ) -> Executable:
        """Return an insert that does nothing if a row has the key, without an error in the transaction around it.

        If the database can do so in one statement, a row that has the key and is ``free`` gets the values of the ``replaced``
        columns instead; otherwise the caller does that next.
        """

    @abstractmethod
    def inserted(self, connection: Connection, insert: Executable, parameters: Mapping[str, Any]) -> bool:
        """Execute such an insert; return whether a row was written."""

    @abstractmethod
    def insert_all(self, table: Table, values: Mapping[str, Any]) -> Executable:
        """Return an insert of many rows. Where the database can, it leaves out rows whose keys exist."""

    @abstractmethod
    def inserted_keys(
        self, connection: Connection, insert: Executable, parameters: Sequence[Mapping[str, Any]]
    ) -> set[tuple[str, str]] | None:
        """Execute such an insert, for some hundreds of rows in one statement.

        Returns:
            The keys of the rows that were written; ``None`` if none was, so that they must be written one by one.
        """

    #: The order of rows that were recorded at the same moment; ``None`` if the clock ticks in microseconds, which is less than a
    #: statement takes.
    recorded_order: ClassVar[ColumnElement[Any] | None] = None

    def as_of_now(self, query: Select[Any]) -> Select[Any]:
        """Return the query so that it sees the row that an insert has met, even if that is newer than the transaction's snapshot."""
        return query

    @abstractmethod
    def next_token(self, token: ColumnElement[int]) -> ColumnElement[int]:
        """Return the token's next value, for the ``SET`` clause of an update that returns its token."""

    @abstractmethod
    def telling_token(self, update: Update, table: Table) -> Executable:
        """Return the update so that it returns the token that it wrote."""

    @abstractmethod
    def token(self, result: CursorResult[Any]) -> int | None:
        """Return the token of such an update; ``None`` if it changed no row."""

    def like(self, column: ColumnElement[str], pattern: str) -> ColumnElement[bool]:
        """Return whether the column matches a pattern with ``*`` and ``?``, case-sensitively."""
        escaped = pattern.replace("!", "!!").replace("%", "!%").replace("_", "!_")
        return column.like(escaped.replace("*", "%").replace("?", "_"), escape="!")

    def exact(self, column: ColumnElement[str]) -> ColumnElement[str]:
        """Return a column of any text, compared case-sensitively."""
        return column

    #: Reads the settings that the store's guarantees depend on; see the port's ``configuration``.
    configuration: ClassVar[Executable]

    @abstractmethod
    def fault(self, error: DBAPIError) -> Fault:
        """Return what an error means."""

    def transaction_status(self, connection: Any) -> TransactionStatus:
        """Return the state of the transaction on a driver's connection."""
        return TransactionStatus.UNKNOWN

    def socket(self, connection: Any) -> int | None:
        """Return the file descriptor of a driver's connection; ``None`` if there is none, it is closed, or the driver has no API for it."""
        return None

    def exists(self, url: URL) -> bool:
        """Return whether there is a database to connect to; ``False`` only where connecting would make it."""
        return True

    def options(self, url: URL) -> dict[str, Any]:
        """Arguments to ``create_engine`` for a store that opens its own connections."""
        return {}

    def prepare(self, opened: Engine) -> None:
        """Set up an engine that the store opened itself, before its first connection."""
        return

    def prepare_for_transactions(self, opened: Engine) -> None:
        """Set up an engine that the store opened itself for transactions of its users."""
        return

    def in_autocommit(self, engine: Engine) -> Engine:
        """Return a user's engine, with connections in autocommit."""
        return engine.execution_options(isolation_level="AUTOCOMMIT")

    def autocommit(self, connection: Connection) -> AbstractContextManager[None]:
        """Make each statement on such a connection a transaction by itself."""
        return nullcontext()

    def furnish(self, driver: object, connection: Any, *, limit: float | None, ours: bool) -> None:
        """Set up a driver's connection that was just opened, and that only the store uses.

        Args:
            driver: The driver's module.
            connection: In autocommit when there is a limit.
            limit: Seconds for which the server works on one statement; ``None`` on connections for atomic bodies, whose statements may take
                as long as they like.
            ours: Whether the store chose how to connect; otherwise the user, who gave an engine.

        Raises:
            ConfigurationError: The server cannot be used like this; the text says what to change.
        """
        return

    def setup(self, connection: Any) -> dict[str, str]:
        """Return how the user's engine set up a driver's connection, in addition to the server's ``configuration``."""
        return {}

    def unlimited(self, connection: Connection) -> AbstractContextManager[None]:
        """Lift the connection's time limit for the statements inside."""
        return nullcontext()

    def timed_out(self, error: DBAPIError) -> bool:
        """Return whether the server gave up the statement, because of its limit or because it was cancelled."""
        return False

    def cancel(self, connection: Any, another: Callable[[], PoolProxiedConnection]) -> Callable[[], object] | None:
        """Return what asks the server to give up the statement that a driver's connection waits for; ``None`` if there is no way.

        Args:
            connection: That connection.
            another: Opens another one.

        Call it in another thread. It may block for seconds, and may raise any error of the driver.
        """
        return None


class OnConflict(Dialect):
    """A dialect with ``ON CONFLICT`` and ``RETURNING``: one statement decides, and returns its decision."""

    #: The dialect's own ``insert()``; both have the same methods.
    _insert: ClassVar[type[postgresql.Insert | sqlite.Insert]]

    def insert(
        self,
        table: Table,
        values: Mapping[str, Any],
        *,
        replaced: Collection[str] = (),
        free: ColumnElement[bool] | None = None,
    ) -> Executable:
        insert = self._insert(table).values(values)
        key = list(table.primary_key.columns)
        if free is None:
            return insert.on_conflict_do_nothing(index_elements=key).returning(table.c.token)
        excluded = {name: insert.excluded[name] for name in replaced}
        return insert.on_conflict_do_update(index_elements=key, set_=excluded, where=free).returning(table.c.token)

    def inserted(self, connection: Connection, insert: Executable, parameters: Mapping[str, Any]) -> bool:
        return connection.execute(insert, parameters).first() is not None

    def insert_all(self, table: Table, values: Mapping[str, Any]) -> Executable:
        insert = (
            self._insert(table).values(values).on_conflict_do_nothing(index_elements=list(table.primary_key.columns))
        )
        return insert.returning(*table.primary_key.columns)

    def inserted_keys(
        self, connection: Connection, insert: Executable, parameters: Sequence[Mapping[str, Any]]
    ) -> set[tuple[str, str]] | None:
        # Because of RETURNING, SQLAlchemy makes one statement of all rows.
        return {(message_id, task_name) for message_id, task_name in connection.execute(insert, list(parameters))}

    def next_token(self, token: ColumnElement[int]) -> ColumnElement[int]:
        return token + 1

    def telling_token(self, update: Update, table: Table) -> Executable:
        return update.returning(table.c.token)

    def token(self, result: CursorResult[Any]) -> int | None:
        token: int | None = result.scalar_one_or_none()
        return token
