"""Run SQLAlchemy on Django's connection: Django opens it, sets it up, and begins and ends its transactions."""

# ruff: noqa: D102 - the methods are SQLAlchemy's

from __future__ import annotations

from datetime import datetime
from typing import Any, Protocol

from sqlalchemy import Dialect
from sqlalchemy.dialects import registry, sqlite
from sqlalchemy.dialects.mysql.mysqldb import MySQLDialect_mysqldb
from sqlalchemy.dialects.mysql.pymysql import MySQLDialect_pymysql
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.types import DateTime

__all__ = ["Transactions", "shared"]


class Transactions(Protocol):
    """What to do when SQLAlchemy begins or ends a transaction on Django's connection."""

    def begin(self) -> None: ...

    def commit(self) -> None: ...

    def roll_back(self) -> None: ...

    def break_off(self) -> None: ...


class _Shared:
    """A dialect that leaves the connection open, and passes transaction calls to ``transactions``."""

    transactions: Transactions

    def on_connect(self) -> Any:
        return None

    def do_begin(self, dbapi_connection: Any) -> None:  # noqa: ARG002
        self.transactions.begin()

    def do_commit(self, dbapi_connection: Any) -> None:  # noqa: ARG002
        self.transactions.commit()

    def do_rollback(self, dbapi_connection: Any) -> None:  # noqa: ARG002
        self.transactions.roll_back()

    def do_close(self, dbapi_connection: Any) -> None:
        """Leave it open."""

    def do_terminate(self, dbapi_connection: Any) -> None:  # noqa: ARG002
        self.transactions.break_off()


class Psycopg(_Shared, PGDialect_psycopg):
    """PostgreSQL by psycopg 3."""

    supports_statement_cache = True


class Psycopg2(_Shared, PGDialect_psycopg2):
    """PostgreSQL by psycopg 2."""

    supports_statement_cache = True


class MySQLdb(_Shared, MySQLDialect_mysqldb):
    """MySQL and MariaDB by mysqlclient."""

    supports_statement_cache = True


class PyMySQL(_Shared, MySQLDialect_pymysql):
    """MySQL and MariaDB by PyMySQL."""

    supports_statement_cache = True


class _DateTime(sqlite.DATETIME):
    """Text, unless Django's connection has already made it a naive datetime."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        from_text = super().result_processor(dialect, coltype)

        def process(value: Any) -> Any:
            return value if from_text is None or isinstance(value, datetime) else from_text(value)

        return process


class SQLite(_Shared, SQLiteDialect_pysqlite):
    """SQLite."""

    supports_statement_cache = True

    colspecs = {**SQLiteDialect_pysqlite.colspecs, DateTime: _DateTime}  # noqa: RUF012 - as SQLAlchemy has it


_SHARED = {
    f"{dialect.name}+{dialect.driver}": (f"{dialect.name}.django_{dialect.driver}", dialect)
    for dialect in (Psycopg, Psycopg2, MySQLdb, PyMySQL, SQLite)
}

for _name, _dialect in _SHARED.values():
    registry.register(_name, __name__, _dialect.__name__)


def shared(drivername: str) -> str:
    """Return the name of the dialect for Django's connection, given the name of the ordinary one."""
    return _SHARED[drivername][0].replace(".", "+")
