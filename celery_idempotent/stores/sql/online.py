"""Change a table while it is in use.

An index is built while others write. A change that needs the whole table for a moment waits for every transaction that has touched it,
such as an atomic body that takes minutes. All later statements wait for the change. So the change waits for two seconds only, lets the
others pass, and tries again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

from sqlalchemy import Connection, PoolProxiedConnection, Table, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import DDLElement, DropIndex

from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.stores.sql.clock import MYSQL_NAMES
from celery_idempotent.stores.sql.migrations import Statement, is_online

__all__ = ["alone", "broken_indexes", "execute", "partitions", "seen_at_once"]

logger = logging.getLogger("celery_idempotent")

#: Seconds for which a statement waits for the table at a time, the pause before the next try, and the time for all tries.
_AT_A_TIME, _PAUSE, _PATIENCE = 2, 1.0, 600.0

#: Seconds between two checks whether the other process has finished.
_LOOK = 0.1

#: Half of the key of PostgreSQL's advisory lock; the other half is the table's name, with its schema.
_ADVISORY = crc32(b"celery_idempotent init") - 2**31

#: In a transaction, the server keeps the snapshot of a statement with parameters, or a prepared one, until the next statement, and
#: index builds would wait for that. This statement has no snapshot.
_LET_GO = "SHOW transaction_isolation"

#: The errors that say that another process has done it already. One comes from PostgreSQL's catalogue, if two create at once.
_DONE = ("already exists", "duplicate key", "duplicate column")
_GONE = ("does not exist", "can't drop", "no such index")


_LOCK_WAIT_TIMEOUT, _LOCK_NOT_AVAILABLE = 1205, "55P03"


@contextmanager
def alone(connection: Connection, table: Table) -> Iterator[None]:
    """Let one process at a time change the table, on databases where two would get in each other's way.

    PostgreSQL finishes an online build of an index only when all transactions have ended that can see the table as it was. A session that waits
    for a lock is one of them: two builds wait for each other, and the one that PostgreSQL ends leaves half an index. So no process waits in the
    database. Such a build is in no transaction, so a second connection holds the lock, in a transaction: a session's lock would stay with the
    session that a pooler had lent. While that transaction is idle it has no snapshot, and no build waits for it. A process that did not get the
    lock ends the transaction in which it asked: a build that once saw it with a snapshot waits for its end.

    SQLite has one writer at a time, and does it all in one transaction. MySQL and MariaDB need nothing: the second process learns that it is done.
    """
    if connection.dialect.name != "postgresql":
        with _sqlite_transaction(connection, "BEGIN IMMEDIATE"):
            yield
        return
    pool = connection.engine.pool.recreate()  # for one connection, which the engine's pool need not keep
    other: PoolProxiedConnection | None = None
    try:
        try:
            # A migration's transaction waits, too.
            connection.exec_driver_sql(_LET_GO)
            other = pool.connect()
            _lock(other, table)
        except connection.dialect.loaded_dbapi.Error as error:
            raise StoreUnavailableError(
                f"cannot change {table.fullname}: no second connection for its lock: {error}"
            ) from error
        yield
    finally:
        if other is not None:
            other.invalidate()  # with its transaction, and the lock
        pool.dispose()


def _lock(other: PoolProxiedConnection, table: Table) -> None:
    """Begin the transaction that has the lock, as soon as the lock is free."""
    waiting = False
    cursor = other.cursor()
    while True:
        cursor.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        cursor.execute("SELECT current_schema()")
        (current,) = cursor.fetchone() or (None,)
        name = f"{table.schema or current}.{table.name}"
        cursor.execute(f"SELECT pg_try_advisory_xact_lock({_ADVISORY}, {crc32(name.encode()) - 2**31})")
        (locked,) = cursor.fetchone() or (False,)
        if locked:
            cursor.execute(_LET_GO)
            return
        cursor.execute("ROLLBACK")
        if not waiting:
            waiting = True
            logger.warning("waiting: another process is changing %s", table.fullname)
        time.sleep(_LOOK)


@contextmanager
def seen_at_once(connection: Connection) -> Iterator[None]:
    """Read from one snapshot inside the block: on SQLite, an index can disappear between reading its name and its columns."""
    with _sqlite_transaction(connection, "BEGIN"):
        yield


@contextmanager
def _sqlite_transaction(connection: Connection, begin: str) -> Iterator[None]:
    """Open a transaction on SQLite, unless there is one already."""
    raw = connection.connection.dbapi_connection
    if connection.dialect.name != "sqlite" or getattr(raw, "in_transaction", True):
        yield
        return
    with _transaction(connection, begin):
        yield


@contextmanager
def _transaction(connection: Connection, begin: str) -> Iterator[None]:
    """Open a transaction on a connection in autocommit."""
    connection.exec_driver_sql(begin)
    try:
        yield
    except BaseException:
        if not connection.invalidated and not _ended_by_itself(connection):
            connection.exec_driver_sql("ROLLBACK")
        raise
    connection.exec_driver_sql("COMMIT")


def _ended_by_itself(connection: Connection) -> bool:
    """Roll back, unless SQLite has ended the transaction after an error."""
    return not getattr(connection.connection.dbapi_connection, "in_transaction", True)


def broken_indexes(connection: Connection, table: Table) -> frozenset[str]:
    """Return the table's indexes whose build did not finish: writes maintain them, but no query uses them."""
    if connection.dialect.name not in {"postgresql", "cockroachdb"}:
        return frozenset()
    found = connection.scalars(
        text(
            "SELECT c.relname FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid "
            "WHERE i.indrelid = to_regclass(:name) AND NOT i.indisvalid"
        ),
        {"name": connection.dialect.identifier_preparer.format_table(table)},
    )
    return frozenset(found)


def partitions(connection: Connection, table: Table) -> list[tuple[str, str]]:
    """Return schema and name of each partition of a PostgreSQL table; none for other tables."""
    if connection.dialect.name != "postgresql":
        return []
    found = connection.execute(
        text(
            "SELECT n.nspname, c.relname FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid "
            "JOIN pg_namespace AS n ON n.oid = c.relnamespace JOIN pg_class AS whole ON whole.oid = i.inhparent "
            "WHERE whole.oid = to_regclass(:name) AND whole.relkind = 'p' ORDER BY n.nspname, c.relname"
        ),
        {"name": connection.dialect.identifier_preparer.format_table(table)},
    )
    return [(schema, name) for schema, name in found]


def execute(connection: Connection, statement: Statement) -> bool:
    """Execute a statement, unless another process does at the same time.

    Returns:
        Whether it was executed here.

    Raises:
        StoreUnavailableError: The table was in use for ten minutes, without a moment in between.
        sqlalchemy.exc.DBAPIError: Any other error of the database.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            with _briefly(connection, statement.ddl):
                connection.execute(statement.ddl)
        except DBAPIError as error:
            said = str(error.orig).lower()
            if any(face in said for face in (_GONE if isinstance(statement.ddl, DropIndex) else _DONE)):
                return False
            if not _in_use(connection, error):
                raise
            if time.monotonic() > deadline:
                raise StoreUnavailableError(
                    f"cannot {statement.what}: transactions that use the table have followed each other for {_PATIENCE:g} s"
                ) from error
            logger.warning("cannot %s yet, a transaction uses the table; asked again in %g s", statement.what, _PAUSE)
            time.sleep(_PAUSE)
        else:
            return True


@contextmanager
def _briefly(connection: Connection, ddl: DDLElement) -> Iterator[None]:
    """Limit how long the statement inside waits for a lock."""
    name = connection.dialect.name
    if name == "postgresql" and not is_online(ddl):  # which blocks no one while it waits
        with _transaction(connection, "BEGIN"):
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_AT_A_TIME}s'")
            yield
        return
    if name not in MYSQL_NAMES:
        yield
        return
    connection.execute(text(f"SET SESSION lock_wait_timeout = {_AT_A_TIME}"))
    try:
        yield
    finally:
        if not connection.invalidated:
            connection.execute(text("SET SESSION lock_wait_timeout = DEFAULT"))


def _in_use(connection: Connection, error: DBAPIError) -> bool:
    """Return whether an error says that the table was in use."""
    if connection.dialect.name in MYSQL_NAMES:
        return bool(error.orig is not None and error.orig.args and error.orig.args[0] == _LOCK_WAIT_TIMEOUT)
    return _LOCK_NOT_AVAILABLE in {getattr(error.orig, "sqlstate", None), getattr(error.orig, "pgcode", None)}
