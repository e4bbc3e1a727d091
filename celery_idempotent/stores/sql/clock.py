"""The database's time: a timestamp column type, and ``now`` and moments relative to it as SQL.

No statement contains a time that Python took: workers' clocks differ by seconds, so two of them could each believe to hold one
lease. Only durations are sent, in seconds. A duration of ``None`` makes the moment ``NULL``, so that "until purged"
and "for an hour" are one prepared statement.
"""

# ruff: noqa: ARG001, ARG002, D102 - signatures and meaning are SQLAlchemy's

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, BindParameter, ColumnElement, DateTime, Dialect, Float, String, bindparam
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine

__all__ = ["FromNow", "JustAfter", "Now", "Seconds", "UtcTimestamp", "seconds"]

MYSQL_NAMES = ("mysql", "mariadb")

#: SQLite has milliseconds; the zeros fill up the microseconds that SQLAlchemy's DateTime writes and reads.
_SQLITE_FORMAT = "'%Y-%m-%d %H:%M:%f000'"


class UtcTimestamp(TypeDecorator[datetime]):
    """A moment in UTC with microseconds; Python always sees an aware ``datetime`` in UTC.

    ``TIMESTAMP WITH TIME ZONE`` on PostgreSQL, ``DATETIME(6)`` on MySQL and MariaDB, on SQLite the text that SQLAlchemy's
    ``DateTime`` uses, which sorts as time does.
    """

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in MYSQL_NAMES:
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime(timezone=dialect.name != "sqlite"))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"the queue log keeps aware datetimes only, got {value!r}")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name in (*MYSQL_NAMES, "sqlite") else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Seconds(TypeDecorator[float]):
    """A duration in seconds, in the form in which each database adds it to a moment."""

    impl = Float
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in MYSQL_NAMES:
            return dialect.type_descriptor(BigInteger())
        return dialect.type_descriptor(String() if dialect.name == "sqlite" else Float())

    def process_bind_param(self, value: float | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if dialect.name in MYSQL_NAMES:
            return round(value * 1_000_000)
        return f"{value:+.6f} seconds" if dialect.name == "sqlite" else float(value)


def seconds(name: str) -> BindParameter[float]:
    """Return a parameter that holds a duration; give it to :class:`FromNow`."""
    return bindparam(name, type_=Seconds())


class Now(FunctionElement[datetime]):
    """The database's clock, the same throughout a statement.

    ``statement_timestamp()`` and not ``now()`` on PostgreSQL: within a transaction the latter stands still, and an atomic
    body would complete at the moment it began.
    """

    type = UtcTimestamp()
    inherit_cache = True


class FromNow(FunctionElement[datetime]):
    """So many seconds from the database's now; negative for the past, ``NULL`` for none."""

    type = UtcTimestamp()
    inherit_cache = True

    def __init__(self, duration: BindParameter[float]) -> None:
        super().__init__(duration)


class JustAfter(FunctionElement[datetime]):
    """Now, or a microsecond after the column's value when that is not in the past: never the same value twice.

    For a column that is compared and set: SQLite's clock ticks in milliseconds, and any clock can be set back.
    """

    type = UtcTimestamp()
    inherit_cache = True

    def __init__(self, column: ColumnElement[Any]) -> None:
        super().__init__(column)


# PostgreSQL's SQL is the default, so that dialects of compatible engines (CockroachDB) use it too. So it uses only what these
# share: no make_interval().


@compiles(Now)
def _now(element: Now, compiler: SQLCompiler, **kw: Any) -> str:
    return "statement_timestamp()"


@compiles(FromNow)
def _from_now(element: FromNow, compiler: SQLCompiler, **kw: Any) -> str:
    return f"(statement_timestamp() + {compiler.process(element.clauses, **kw)} * INTERVAL '1 second')"


@compiles(JustAfter)
def _just_after(element: JustAfter, compiler: SQLCompiler, **kw: Any) -> str:
    column = compiler.process(element.clauses, **kw)
    return f"GREATEST(statement_timestamp(), COALESCE({column} + INTERVAL '1 microsecond', statement_timestamp()))"


@compiles(Now, *MYSQL_NAMES)
def _now_mysql(element: Now, compiler: SQLCompiler, **kw: Any) -> str:
    return "UTC_TIMESTAMP(6)"


@compiles(FromNow, *MYSQL_NAMES)
def _from_now_mysql(element: FromNow, compiler: SQLCompiler, **kw: Any) -> str:
    return f"DATE_ADD(UTC_TIMESTAMP(6), INTERVAL {compiler.process(element.clauses, **kw)} MICROSECOND)"


@compiles(JustAfter, *MYSQL_NAMES)
def _just_after_mysql(element: JustAfter, compiler: SQLCompiler, **kw: Any) -> str:
    column = compiler.process(element.clauses, **kw)
    return f"GREATEST(UTC_TIMESTAMP(6), COALESCE(DATE_ADD({column}, INTERVAL 1 MICROSECOND), UTC_TIMESTAMP(6)))"


@compiles(Now, "sqlite")
def _now_sqlite(element: Now, compiler: SQLCompiler, **kw: Any) -> str:
    return f"strftime({_SQLITE_FORMAT}, 'now')"


@compiles(FromNow, "sqlite")
def _from_now_sqlite(element: FromNow, compiler: SQLCompiler, **kw: Any) -> str:
    return f"strftime({_SQLITE_FORMAT}, 'now', {compiler.process(element.clauses, **kw)})"


@compiles(JustAfter, "sqlite")
def _just_after_sqlite(element: JustAfter, compiler: SQLCompiler, **kw: Any) -> str:
    column = compiler.process(element.clauses, **kw)
    # The digits suffice for a thousand such values within one millisecond.
    later = f"substr({column}, 1, 23) || printf('%03d', CAST(substr({column}, 24, 3) AS INTEGER) + 1)"
    return f"max(strftime({_SQLITE_FORMAT}, 'now'), coalesce({later}, ''))"
