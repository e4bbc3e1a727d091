"""PostgreSQL and compatible databases: CockroachDB and YugabyteDB support all that is used here."""

# ruff: noqa: ARG002, D102 - documented in the base class

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Connection, PoolProxiedConnection, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from celery_idempotent.core.store import TransactionStatus
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.stores.sql.dialects.base import Fault, OnConflict

__all__ = ["PostgreSQL"]

#: statement_completion_unknown: CockroachDB lost a node while it committed.
_LOST = {"40003"}
#: serialization_failure, deadlock_detected, lock_not_available (``lock_timeout``).
_COLLISIONS = {"40001", "40P01", "55P03"}
#: undefined_table, undefined_column, invalid_schema_name.
_SCHEMA = {"42P01", "42703", "3F000"}
#: read_only_sql_transaction: a standby, as the primary is after a failover. psycopg calls it an InternalError.
_MOVED = {"25006"}
#: query_canceled: by its own limit, by us, or by an operator.
_CANCELED = "57014"

#: The texts with which a server, or PgBouncer, refuses an account.
_DENIED = re.compile(
    r'FATAL: +(?:(?:database|role) "[^\n]*" does not exist|(?:password|SASL) authentication failed|no pg_hba\.conf entry|no such database'
    r'|permission denied for database|role "[^\n]*" is not permitted to log in)|no password supplied'
)

#: libpq's PQTRANS_IDLE and PQTRANS_INERROR: after an error PostgreSQL answers a commit by a rollback.
_STATUS = {0: TransactionStatus.NONE, 3: TransactionStatus.FAILED}

#: Seconds to reach the server; libpq itself waits as long as TCP, for minutes.
_CONNECT_TIMEOUT = 10

#: How often psycopg executes a statement before it prepares it under a name.
_NAMED_AFTER = 5

#: Seconds for the server to accept a cancellation.
_CANCEL_TIMEOUT = 5.0

#: Whether the server's process is the one reported at the login, and the lower statement limit: ours, or the one already set. A pooler
#: reports a made-up process: it has fewer sessions than clients, so session settings and prepared statements would reach the next client.
_LOOK = (
    "SELECT pg_backend_pid() = %(pid)s,"
    " LEAST(NULLIF(EXTRACT(EPOCH FROM current_setting('statement_timeout')::interval) * 1000, 0), %(limit)s)::int"
)
_SET = "SELECT set_config('DateStyle', 'ISO', false), set_config('statement_timeout', %(limit)s, false)"


class PostgreSQL(OnConflict):
    """``INSERT ... ON CONFLICT DO UPDATE ... RETURNING``, ``UPDATE ... RETURNING``."""

    names = ("postgresql", "cockroachdb")
    _insert = postgresql.Insert
    configuration = text(
        "SELECT name, setting FROM pg_settings WHERE name IN "
        "('default_transaction_isolation', 'fsync', 'synchronous_commit', 'default_transaction_read_only')"
    )

    def fault(self, error: DBAPIError) -> Fault:
        # psycopg names it sqlstate, psycopg2 pgcode; neither is there when no connection was made.
        state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
        if error.connection_invalidated or state in _LOST:
            return Fault.LOST
        if state in _COLLISIONS:
            return Fault.COLLISION
        if state in _SCHEMA:
            return Fault.SCHEMA
        if state in _MOVED:
            return Fault.MOVED
        if error.statement is None and _is_denied(str(error.orig)):
            return Fault.DENIED
        return Fault.UNAVAILABLE if isinstance(error, OperationalError | InterfaceError) else Fault.OTHER

    def timed_out(self, error: DBAPIError) -> bool:
        return _CANCELED in {getattr(error.orig, "sqlstate", None), getattr(error.orig, "pgcode", None)}

    def transaction_status(self, connection: Any) -> TransactionStatus:
        status = getattr(getattr(connection, "info", None), "transaction_status", None)  # of psycopg and psycopg2
        if status is None:
            return TransactionStatus.UNKNOWN
        return _STATUS.get(int(status), TransactionStatus.OPEN)

    def socket(self, connection: Any) -> int | None:
        tell = getattr(connection, "fileno", None)  # psycopg and psycopg2 have it
        return None if tell is None or connection.closed else int(tell())

    def options(self, url: URL) -> dict[str, Any]:
        # A database in SQL_ASCII does not know its encoding, and psycopg then returns bytes.
        wanted = {"connect_timeout": _CONNECT_TIMEOUT, "client_encoding": "utf8"}
        arguments: dict[str, Any] = {name: value for name, value in wanted.items() if name not in url.query}
        if url.get_driver_name() == "psycopg":
            arguments["prepare_threshold"] = None  # see `furnish`
        return {"connect_args": arguments}

    def furnish(self, driver: object, connection: Any, *, limit: float | None, ours: bool) -> None:
        style = str(connection.info.parameter_status("DateStyle") or "ISO")
        iso = style.startswith("ISO")
        if limit is None and iso:
            return
        wanted = 0 if limit is None else round(limit * 1000)
        direct, milliseconds = _ask(connection, _LOOK, pid=connection.info.backend_pid, limit=wanted)
        if direct:
            _ask(connection, _SET, limit=str(milliseconds))
            # A prepared statement is planned once for its connection.
            if ours and limit is not None and hasattr(connection, "prepare_threshold"):
                connection.prepare_threshold = _NAMED_AFTER
        elif not iso:
            raise ConfigurationError(
                f"the server writes dates in the style {style}, and behind a pooler no session can ask for another; "
                f"run: ALTER ROLE {connection.info.user} SET DateStyle = ISO"
            )
        else:
            connection.prepare_threshold = None
            # psycopg's that put values into the text; psycopg2 has no others.
            cursors = getattr(driver, "ClientCursor", None) or type(connection.cursor())
            connection.cursor_factory = _limited(cursors, milliseconds)

    def setup(self, connection: Any) -> dict[str, str]:
        threshold = getattr(connection, "prepare_threshold", None)
        direct, _ = _ask(connection, _LOOK, pid=connection.info.backend_pid, limit=0)
        return {
            **({} if direct else {"pooler": "on"}),
            **({} if threshold is None else {"prepare_threshold": str(threshold)}),
        }

    @contextmanager
    def unlimited(self, connection: Connection) -> Iterator[None]:
        raw: Any = connection.connection.dbapi_connection
        cursors = raw.cursor_factory
        if isinstance(cursors, type) and issubclass(cursors, _Limited):
            raw.cursor_factory = cursors.unlimited
            try:
                yield
            finally:
                raw.cursor_factory = cursors
            return
        before = connection.exec_driver_sql("SHOW statement_timeout").scalar()
        connection.exec_driver_sql("SET statement_timeout = 0")
        try:
            yield
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql(f"SET statement_timeout = '{before}'")

    def cancel(self, connection: Any, another: Callable[[], PoolProxiedConnection]) -> Callable[[], object] | None:
        # psycopg's since 3.2, with a timeout where libpq is of 17; before, and psycopg2's, as long as TCP takes.
        safe = getattr(connection, "cancel_safe", None)
        return connection.cancel if safe is None else lambda: safe(timeout=_CANCEL_TIMEOUT)


def _is_denied(text: str) -> bool:
    """Return whether all servers that were tried refused the account. libpq gives no code for that, so this knows only its English texts."""
    return len(_DENIED.findall(text)) >= max(1, text.count("connection to server at"))


def _ask(connection: Any, question: str, **parameters: Any) -> Any:
    cursor = connection.cursor()
    try:
        cursor.execute(question, parameters)
        return cursor.fetchone()
    finally:
        cursor.close()


class _Limited:
    """Marks the cursors that send a limit with each statement.

    Attributes:
        unlimited: The same cursors without a limit.
    """

    unlimited: type[Any]


def _limited(cursors: Any, milliseconds: int) -> type[_Limited]:
    """Cursors that send each statement in one message with its limit. The message is one transaction, with which the limit ends."""

    class Limited(cursors, _Limited):  # type: ignore[misc]
        unlimited = cursors

        def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(query, str):  # the driver's own
                return super().execute(query, *args, **kwargs)
            super().execute(f"SET LOCAL statement_timeout = {milliseconds}; {query}", *args, **kwargs)
            # psycopg starts at the first result; psycopg2 has only the last.
            while hasattr(self, "pgresult") and self.nextset():
                pass
            return self

    return Limited
