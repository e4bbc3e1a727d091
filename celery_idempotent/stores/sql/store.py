"""The store: its verbs by role, and its life."""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, ClassVar

from sqlalchemy import URL, Connection, Engine, MetaData

from celery_idempotent.core.store import Change, TransactionStatus
from celery_idempotent.stores.sql import schema
from celery_idempotent.stores.sql.address import parse, refuse_asynchronous, refuse_driver
from celery_idempotent.stores.sql.admin import Admin
from celery_idempotent.stores.sql.claims import Claims
from celery_idempotent.stores.sql.connection import Database
from celery_idempotent.stores.sql.dialects import Dialect, dialect_named
from celery_idempotent.stores.sql.migrations import newest, statements_to
from celery_idempotent.stores.sql.reading import Reading
from celery_idempotent.stores.sql.recording import Recording
from celery_idempotent.stores.sql.recovering import Recovering
from celery_idempotent.stores.sql.table import queue_log_table
from celery_idempotent.stores.sql.transitions import Transitions

if TYPE_CHECKING:
    from celery_idempotent.core.store.transactional import Surrounding

__all__ = ["SQLStore"]


class SQLStore(Recording, Claims, Transitions, Recovering, Reading, Admin):
    """The queue log in a table of PostgreSQL, MySQL, MariaDB or SQLite.

    Implements :class:`~celery_idempotent.core.store.TransactionalStore`.

    Safe between threads, greenlets and processes, and across forks: nothing is connected before the first verb, and each
    process connects for itself. Before a process's first verb the table is looked at; on SQLite it is made if missing.

    Args:
        url_or_engine: A URL, as for :func:`~celery_idempotent.stores.open_store`; or a synchronous SQLAlchemy engine of yours, which
            stays yours: it is never disposed of, except that after a fork its inherited pool is dropped (unclosed, by
            ``dispose(close=False)``). Atomic bodies run on its connections. The store's own statements run on others, which are made as it
            makes its own, by its creator and with its ``connect`` listeners, in a pool of the same size; they are closed with the store, and when the
            engine is disposed of. On SQLite, and with an engine that has no ``QueuePool``, they run on the engine's own. On MySQL and MariaDB an
            engine of yours ought to be in strict SQL mode.
        table: The table's name, or ``schema.name``.

    Raises:
        ConfigurationError: The URL is not valid, its driver is missing, the engine is asynchronous, or the database is of another kind.

    An in-memory SQLite database (``sqlite://``) lives and dies with its process and with :meth:`close`.
    """

    def __init__(self, url_or_engine: str | URL | Engine, *, table: str = "queue_log") -> None:
        refuse_asynchronous(url_or_engine)
        target = url_or_engine if isinstance(url_or_engine, Engine) else parse(url_or_engine)
        if isinstance(target, Engine):
            refuse_driver(target.dialect.driver)
        dialect = dialect_named(target.dialect.name if isinstance(target, Engine) else target.get_backend_name())
        namespace, _, name = table.rpartition(".")
        declared = queue_log_table(MetaData(), name, schema=namespace or None)
        super().__init__(declared, self._open(target, dialect, self._prepare))

    def _open(self, target: URL | Engine, dialect: Dialect, prepare: Callable[[Connection], None]) -> Database:
        return Database(target, dialect, prepare)

    def __repr__(self) -> str:
        return f"SQLStore({str(self._database)!r}, table={self._table.fullname!r})"

    #: Whether a framework's tests undo what is written here, each by itself.
    undone_by_tests: ClassVar[bool] = False

    @property
    def in_memory(self) -> bool:
        """Whether the rows are in an in-memory SQLite database, which lives and dies with this process."""
        return self._database.in_memory

    @property
    def lasting(self) -> bool:
        """Whether what is written now outlives this process, and is not undone by a test."""
        return not self.in_memory

    @property
    def shares_engine(self) -> bool:
        """Whether it uses an engine of the user's."""
        return self._database.is_shared

    @property
    def engine(self) -> Engine:
        """An engine for transactions of your own on the store's database: the one you gave, or one with its own pool.

        Opened lazily, per process; :meth:`close` disposes of the store's own.
        """
        return self._database.engine

    def within(self, connection: Connection) -> SQLStore:
        """Return this store with its verbs in a transaction of yours: what they write is committed, or not, by you.

        Args:
            connection: One of :attr:`engine`'s database, in a transaction.

        Raises:
            ConfigurationError: It is a connection to another kind of database.
            SchemaError: The table is not there; on SQLite it is made if missing.
        """
        joined = copy(self)
        joined._run = self._database.join(connection).run  # noqa: SLF001 - it is one of us
        return joined

    begins_before_body: ClassVar[bool] = False

    def surrounding(self) -> Surrounding | None:
        return None

    def check_worker(self) -> None:
        """Do nothing: a worker sees what is committed, and nothing else was recorded."""

    def watch(self, connection: Connection, note: Callable[[BaseException], None]) -> None:
        """Do nothing: SQLAlchemy makes every statement."""

    def transaction_status(self, connection: Connection) -> TransactionStatus:
        return self._dialect.transaction_status(connection.connection.driver_connection)

    def gave_way(self, error: BaseException) -> bool:
        return self._database.gave_way(error)

    def collided(self, error: BaseException) -> bool:
        return self._database.collided(error)

    def init(self, *, before: Callable[[Change], None] | None = None) -> bool:
        return self._run(lambda on: schema.create(on.connection, self._table, before), prepared=False, patient=True)

    def outstanding(self) -> list[Change]:
        if not self._database.exists():
            return [each.change(self.engine.dialect) for each in statements_to(newest(), self._table.name, None, None)]
        return self._run(lambda on: schema.outstanding(on.connection, self._table), prepared=False)

    def check(self) -> None:
        self._run(lambda on: self._prepare(on.connection), prepared=False)

    def inspect(self) -> bool:
        if not self._database.exists():
            return False
        return self._run(lambda on: self._inspect(on.connection), prepared=False)

    def close(self) -> None:
        self._database.close()

    def _prepare(self, connection: Connection) -> None:
        if self._dialect.creates_table:
            schema.create(connection, self._table)
        else:
            schema.verify(connection, self._table)

    def _inspect(self, connection: Connection) -> bool:
        if self._dialect.creates_table and not schema.is_there(connection, self._table):
            return False
        schema.verify(connection, self._table)
        return True
