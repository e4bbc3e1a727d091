"""MySQL and MariaDB, which have no ``ON CONFLICT`` and not both ``RETURNING``."""

# ruff: noqa: ARG001, ARG002, D102 - documented in the base class

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

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
    collate,
    event,
    func,
    insert,
    text,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError

from celery_idempotent.core.store import TransactionStatus
from celery_idempotent.stores.sql.dialects.base import Dialect, Fault

__all__ = ["MySQL"]

_DUPLICATE_KEY = 1062
#: Deadlock, lock wait timeout; a row that changed since the transaction's snapshot (MariaDB's ``innodb_snapshot_isolation``).
_COLLISIONS = {1020, 1205, 1213}
#: Unknown column, unknown table.
_SCHEMA = {1054, 1146}
#: Errors that pass with time or by an operator, among those that PyMySQL raises as OperationalError (all that it has no class for).
_UNAVAILABLE = {
    *(1040, 1203, 1226),  # too many connections, of a user, of a resource
    *(1021, 1030, 1037, 1041, 1114, 3675),  # disk full, storage error, out of memory, table full
    *(1053, 1077, 1079, 1927),  # shutting down, killed
    *(1158, 1159, 1160, 1161),  # packets not read or written
    *(1047, 1180, 3101),  # cluster member not ready, error at commit
}
#: Access or database not there (yet).
_DENIED = {1044, 1045, 1049, 1698}

#: The flag of the protocol that says that the session is in a transaction.
_IN_TRANSACTION = 1

_STRICT = "sql_mode = CONCAT_WS(',', @@SESSION.sql_mode, 'STRICT_ALL_TABLES')"

#: The server, or the transaction, is read only: this was the primary before a failover.
_MOVED = {1290, 1792, 1836}
#: The statement took too long, or was interrupted.
_TIMED_OUT = {1317, 1969, 3024}

#: Seconds to reach the server, and for each of its messages until the login is done.
_CONNECT_TIMEOUT = 10


class MySQL(Dialect):
    """A plain insert, whose duplicate-key error says that the row exists; ``LAST_INSERT_ID(token + 1)`` returns an update's token."""

    names = ("mysql", "mariadb")
    # Not by `@@name`: MySQL and MariaDB have different names for the first, and each refuses an unknown name.
    configuration = text(
        "SHOW VARIABLES WHERE Variable_name IN ('transaction_isolation', 'tx_isolation', 'innodb_snapshot_isolation', "
        "'innodb_flush_log_at_trx_commit', 'sync_binlog', 'read_only')"
    )

    def insert(
        self,
        table: Table,
        values: Mapping[str, Any],
        *,
        replaced: Collection[str] = (),
        free: ColumnElement[bool] | None = None,
    ) -> Executable:
        return insert(table).values(values)

    def inserted(self, connection: Connection, insert: Executable, parameters: Mapping[str, Any]) -> bool:
        try:
            connection.execute(insert, parameters)
        except IntegrityError as error:
            # A statement that fails leaves an InnoDB transaction around it intact.
            if _code(error) == _DUPLICATE_KEY:
                return False
            raise
        return True

    def insert_all(self, table: Table, values: Mapping[str, Any]) -> Executable:
        return insert(table).values(values).returning(*table.primary_key.columns)

    def inserted_keys(
        self, connection: Connection, insert: Executable, parameters: Sequence[Mapping[str, Any]]
    ) -> set[tuple[str, str]] | None:
        if not connection.dialect.insert_returning:  # MariaDB has it since 10.5, MySQL has not
            return None
        try:
            return {(message_id, task_name) for message_id, task_name in connection.execute(insert, list(parameters))}
        except IntegrityError as error:
            # One of the keys exists, so the statement has written no row.
            if _code(error) == _DUPLICATE_KEY:
                return None
            raise

    def as_of_now(self, query: Select[Any]) -> Select[Any]:
        # For REPEATABLE READ, the default. The insert has left such a lock on the row already.
        return query.with_for_update(read=True)

    def next_token(self, token: ColumnElement[int]) -> ColumnElement[int]:
        return func.last_insert_id(token + 1, type_=token.type)

    def telling_token(self, update: Update, table: Table) -> Executable:
        return update

    def token(self, result: CursorResult[Any]) -> int | None:
        # It comes in the OK packet of the update itself. SQLAlchemy asks for CLIENT.FOUND_ROWS: a matched row counts.
        return result.lastrowid if result.rowcount else None

    def exact(self, column: ColumnElement[str]) -> ColumnElement[str]:
        return collate(column, "utf8mb4_bin")

    def fault(self, error: DBAPIError) -> Fault:
        code = _code(error)
        if error.connection_invalidated:
            return Fault.LOST
        if code in _COLLISIONS:
            return Fault.COLLISION
        if code in _SCHEMA:
            return Fault.SCHEMA
        if code in _MOVED:
            return Fault.MOVED
        if code in _DENIED:
            return Fault.DENIED
        # Errors of the client library itself (2000 and up) are about the connection.
        if code in _UNAVAILABLE | _TIMED_OUT or isinstance(error, InterfaceError):
            return Fault.UNAVAILABLE
        return Fault.UNAVAILABLE if isinstance(error, OperationalError) and 2000 <= code < 3000 else Fault.OTHER

    def transaction_status(self, connection: Any) -> TransactionStatus:
        status = getattr(connection, "server_status", None)  # of PyMySQL
        if status is None:
            return TransactionStatus.UNKNOWN
        return TransactionStatus.OPEN if status & _IN_TRANSACTION else TransactionStatus.NONE

    def timed_out(self, error: DBAPIError) -> bool:
        return _code(error) in _TIMED_OUT

    def socket(self, connection: Any) -> int | None:
        # PyMySQL has no public API for it, and other drivers have none.
        descriptor = getattr(getattr(connection, "_sock", None), "fileno", lambda: -1)()
        return None if descriptor < 0 else int(descriptor)

    def options(self, url: URL) -> dict[str, Any]:
        if url.get_driver_name() != "pymysql":
            return {}
        # PyMySQL's connect_timeout ends with TCP's handshake; a server that accepts and says nothing is read_timeout's.
        timeouts = ("connect_timeout", "read_timeout", "write_timeout")
        return {"connect_args": {name: _CONNECT_TIMEOUT for name in timeouts if name not in url.query}}

    def prepare(self, opened: Engine) -> None:
        if "read_timeout" in self.options(opened.url).get("connect_args", ()):
            event.listen(opened, "connect", _take_your_time)
        if not hasattr(opened.dialect, "detect_autocommit_setting"):  # SQLAlchemy before 2.0.43
            _skip_autocommit_rollback(opened)

    def furnish(self, driver: object, connection: Any, *, limit: float | None, ours: bool) -> None:
        # Without strict mode, a too long id would be cut, and two ids could become one. A user's engine is the user's responsibility.
        settings = [_STRICT] if ours else []
        if limit is not None:
            settings += [
                # Keep a lower limit that is already set; 0 is none.
                f"{name} = IF(@@{name} > 0, LEAST(@@{name}, {value:g}), {value:g})"
                for name, value in _limits(connection, limit).items()
            ]
        if settings:
            _execute(connection, f"SET {', '.join(settings)}")

    @contextmanager
    def unlimited(self, connection: Connection) -> Iterator[None]:
        names = _limits(connection.connection.dbapi_connection, 0.0)
        before = connection.exec_driver_sql(f"SELECT {', '.join(f'@@{name}' for name in names)}").one()
        connection.exec_driver_sql(f"SET {', '.join(f'{name} = DEFAULT' for name in names)}")
        try:
            yield
        finally:
            if not connection.invalidated:
                settings = ", ".join(f"{name} = {value}" for name, value in zip(names, before, strict=True))
                connection.exec_driver_sql(f"SET {settings}")

    def cancel(self, connection: Any, another: Callable[[], PoolProxiedConnection]) -> Callable[[], object] | None:
        number = getattr(connection, "thread_id", None)  # PyMySQL and mysqlclient have it
        return None if number is None else partial(_kill, number(), another)


def _code(error: DBAPIError) -> int:
    code = error.orig.args[0] if error.orig is not None and error.orig.args else 0
    return code if isinstance(code, int) else 0


def _limits(connection: Any, seconds: float) -> dict[str, float]:
    """Return the settings that end a statement. MySQL has one for what only reads, and two for what waits for a lock; MariaDB has one for all."""
    if "MariaDB" in connection.get_server_info():
        return {"max_statement_time": seconds}
    waiting = max(1, round(seconds))
    return {
        "lock_wait_timeout": waiting,
        "innodb_lock_wait_timeout": waiting,
        "max_execution_time": round(seconds * 1000),
    }


def _execute(connection: Any, statement: str) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()


def _kill(number: int, another: Callable[[], PoolProxiedConnection]) -> None:
    """End the statement of a connection, from another connection of the same account."""
    connection = another()
    try:
        _execute(connection, f"KILL QUERY {number}")
    finally:
        connection.invalidate()


def _take_your_time(connection: Any, record: Any) -> None:
    """Lift the read timeout after connecting: from then on the store limits how long an answer may take."""
    connection._read_timeout = None  # noqa: SLF001 - it has no other name


def _skip_autocommit_rollback(opened: Engine) -> None:
    """Do what ``create_engine(skip_autocommit_rollback=True)`` does since SQLAlchemy 2.0.43.

    Otherwise a ``ROLLBACK`` follows each statement on its own: PyMySQL, unlike psycopg, sends it whether or not a
    transaction is open.
    """
    rollback = opened.dialect.do_rollback

    def do_rollback(connection: Any) -> None:
        if not connection.get_autocommit():
            rollback(connection)

    opened.dialect.do_rollback = do_rollback  # type: ignore[method-assign, assignment]
