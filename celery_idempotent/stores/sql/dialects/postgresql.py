"""PostgreSQL, and what speaks its language: nothing here is beyond CockroachDB and YugabyteDB."""

# ruff: noqa: D102 - documented in the base class

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from celery_idempotent.stores.sql.dialects.base import Fault, OnConflict

__all__ = ["PostgreSQL"]

#: statement_completion_unknown: CockroachDB lost a node while it committed.
_LOST = {"40003"}
#: serialization_failure, deadlock_detected.
_COLLISIONS = {"40001", "40P01"}
#: undefined_table, undefined_column, invalid_schema_name.
_SCHEMA = {"42P01", "42703", "3F000"}
#: read_only_sql_transaction (a standby after a failover): psycopg calls it an InternalError.
_UNAVAILABLE = {"25006"}

#: libpq's PQTRANS_INERROR: after an error PostgreSQL answers a commit by a rollback.
_IN_ERROR = 3

#: Seconds to reach the server; libpq itself waits for as long as TCP does, which is minutes.
_CONNECT_TIMEOUT = 10


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
        if state in _UNAVAILABLE or isinstance(error, OperationalError | InterfaceError):
            return Fault.UNAVAILABLE
        return Fault.OTHER

    def gave_up(self, connection: Any) -> bool | None:
        status = getattr(getattr(connection, "info", None), "transaction_status", None)  # of psycopg and psycopg2
        return None if status is None else int(status) == _IN_ERROR

    def socket(self, connection: Any) -> int | None:
        tell = getattr(connection, "fileno", None)  # psycopg and psycopg2 have it, pg8000 does not
        return None if tell is None or connection.closed else int(tell())

    def options(self, url: URL) -> dict[str, Any]:
        return {} if "connect_timeout" in url.query else {"connect_args": {"connect_timeout": _CONNECT_TIMEOUT}}
