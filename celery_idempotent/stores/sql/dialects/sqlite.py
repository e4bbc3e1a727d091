"""SQLite: a file between processes of one host, or memory within one process."""

# ruff: noqa: ARG001, D102 - documented in the base class

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import URL, ColumnElement, Connection, Engine, StaticPool, event, literal_column, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError, OperationalError

from celery_idempotent.core.begin import begin
from celery_idempotent.core.store import TransactionStatus
from celery_idempotent.stores.sql.dialects.base import Fault, OnConflict

if TYPE_CHECKING:
    import sqlite3

__all__ = ["SQLite", "in_memory"]

#: Seconds for which a writer waits for the others: SQLite has one at a time.
BUSY_TIMEOUT = 30.0


class SQLite(OnConflict):
    """SQL as for PostgreSQL, in one file with a write-ahead log; every commit is synced to disk."""

    names = ("sqlite",)
    creates_table = True
    # Its clock ticks in milliseconds.
    recorded_order = literal_column("rowid")
    _insert = sqlite.Insert
    configuration = text(
        "SELECT 'journal_mode', journal_mode FROM pragma_journal_mode "
        "UNION ALL SELECT 'synchronous', synchronous FROM pragma_synchronous "
        "UNION ALL SELECT 'file', file FROM pragma_database_list WHERE name = 'main'"
    )

    def like(self, column: ColumnElement[str], pattern: str) -> ColumnElement[bool]:
        # LIKE ignores case here. GLOB does not; its only other wildcard is the bracket.
        return column.op("GLOB", is_comparison=True)(pattern.replace("[", "[[]"))

    def fault(self, error: DBAPIError) -> Fault:
        text = str(error.orig)
        if not isinstance(error, OperationalError):
            return Fault.LOST if error.connection_invalidated else Fault.OTHER
        if "locked" in text or "schema has changed" in text:
            return Fault.COLLISION
        if "no such table" in text or "no such column" in text or "has no column" in text:
            return Fault.SCHEMA
        if any(
            word in text for word in ("unable to open", "disk", "readonly", "interrupted", "out of memory", "locking")
        ):
            return Fault.UNAVAILABLE
        return Fault.OTHER

    def transaction_status(self, connection: Any) -> TransactionStatus:
        # After some errors, such as a full disk, SQLite has rolled back by itself.
        return TransactionStatus.OPEN if connection.in_transaction else TransactionStatus.NONE

    def exists(self, url: URL) -> bool:
        # A name that begins with "file:" is a URI, with any options.
        return in_memory(url) or str(url.database).startswith("file:") or Path(str(url.database)).exists()

    def options(self, url: URL) -> dict[str, Any]:
        arguments: dict[str, Any] = {"connect_args": {"check_same_thread": False}}
        if "timeout" not in url.query:
            arguments["connect_args"]["timeout"] = BUSY_TIMEOUT
        if in_memory(url):
            arguments["poolclass"] = StaticPool
        return arguments

    def prepare(self, opened: Engine) -> None:
        event.listen(opened, "do_connect", _make_private)
        event.listen(opened, "connect", _set_pragmas)

    def prepare_for_transactions(self, opened: Engine) -> None:
        event.listen(opened, "begin", begin)

    def in_autocommit(self, engine: Engine) -> Engine:
        return engine  # SQLAlchemy's autocommit would leave the driver in another mode than the user set

    @contextmanager
    def autocommit(self, connection: Connection) -> Iterator[None]:
        # Listeners for the beginning of a transaction run now. SQLAlchemy's recipes for SQLite begin one in the database there,
        # which is never committed; or have the driver do that, always (`autocommit=False`, since Python 3.12).
        connection.begin()
        driver = cast("Any", connection.connection.driver_connection)
        level, always = driver.isolation_level, getattr(driver, "autocommit", None) is False
        if always:
            driver.autocommit = True
        driver.isolation_level = None
        if driver.in_transaction:
            driver.commit()
        try:
            yield
        finally:
            if not connection.invalidated:
                driver.isolation_level = level
                if always:
                    driver.autocommit = False


def in_memory(url: URL) -> bool:
    """Return whether the database lives in the memory of one process."""
    return url.database in (None, "", ":memory:") or url.query.get("mode") == "memory"


def _make_private(dialect: object, record: object, arguments: list[Any], named: object) -> None:
    """Create a new file so that only its owner may read it: it contains arguments and results. An existing file keeps its mode.

    SQLite would let everyone read it. Its journals get the same mode. A file named by a URI ("file:") is left to SQLite.
    """
    path = str(arguments[0])
    if path != ":memory:" and not path.startswith("file:"):
        with contextlib.suppress(OSError):  # it exists; or it cannot be created, which SQLite reports better
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _set_pragmas(connection: sqlite3.Connection, record: Any) -> None:
    import sqlite3  # imported like any driver: only for a store that needs it

    # If another process changes the journal's mode too, SQLite answers "locked" without waiting for busy_timeout.
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").close()
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    # NORMAL loses the last commits in a power cut. A lost claim or completion would run a task twice.
    connection.execute("PRAGMA synchronous = FULL").close()
