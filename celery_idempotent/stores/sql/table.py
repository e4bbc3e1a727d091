"""The table ``queue_log``: its columns, their types, its indexes, and its versions.

A version is only ever added at the end of :data:`VERSIONS`. Code that is one version older works on the newer table: it names the
columns that it inserts and reads. So a new column must be nullable or have a server default. No column is dropped, renamed, narrowed or given
another meaning, since older code would not notice. ADR 12.
"""

# ruff: noqa: ARG001, ARG002, D102 - signatures and meaning are SQLAlchemy's

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Dialect,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    or_,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import TypeCompiler
from sqlalchemy.types import TypeDecorator, TypeEngine

from celery_idempotent.core.storable import storable_error
from celery_idempotent.stores.sql.clock import MYSQL_NAMES, UtcTimestamp

__all__ = ["VERSIONS", "ErrorText", "ExactText", "Version", "queue_log_table", "table_of_version"]


class ExactText(String):
    """Text compared byte for byte: ``A`` is not ``a``, and a trailing blank counts.

    PostgreSQL and SQLite do so anyway; MySQL and MariaDB need a collation, each one that the other lacks.
    """


@compiles(ExactText, *MYSQL_NAMES)
def _exact_text_mysql(type_: ExactText, compiler: TypeCompiler, **kw: Any) -> str:
    collation = "utf8mb4_nopad_bin" if getattr(compiler.dialect, "is_mariadb", False) else "utf8mb4_0900_bin"
    return f"VARCHAR({type_.length}) CHARACTER SET utf8mb4 COLLATE {collation}"


class ErrorText(TypeDecorator[str]):
    """The text of an error, which may contain anything: characters that no database can store are written as escapes."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in MYSQL_NAMES:
            return dialect.type_descriptor(mysql.LONGTEXT(charset="utf8mb4"))
        return dialect.type_descriptor(Text())

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else storable_error(value)


def queue_log_table(metadata: MetaData, name: str = "queue_log", schema: str | None = None) -> Table:
    """Return the queue log's table, in your metadata: for Alembic, and for joins with your own tables.

    The library only asks that a table of that name has these columns; more columns (nullable or with a server default)
    and more indexes are yours to add. Keep ``status`` and the timestamps out of indexes on PostgreSQL: each index over
    a column that a claim or a completion changes is written at every message.

    Args:
        metadata: Where the table is declared. A table of that name already in it is returned as it is.
        name: The table's name, as in the setting ``idempotent_table``.
        schema: The schema (PostgreSQL) or database (MySQL, MariaDB) it lives in; ``None`` for the connection's default.

    Returns:
        The table. Nothing is created: that is for your migration, or ``celery -A proj idempotent init``.
    """
    declared = metadata.tables.get(f"{schema or metadata.schema}.{name}" if schema or metadata.schema else name)
    return table_of_version(len(VERSIONS), metadata, name, schema) if declared is None else declared


def table_of_version(version: int, metadata: MetaData, name: str, schema: str | None) -> Table:
    """Return the table of a version."""
    table = Table(
        name,
        metadata,
        *(column for each in VERSIONS[:version] for column in each.columns()),
        schema=schema,
        # Rows and their locks need InnoDB; its DYNAMIC format lets a key have 3072 bytes (this one has up to 2040).
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_row_format="DYNAMIC",
        mariadb_engine="InnoDB",
        mariadb_charset="utf8mb4",
        mariadb_row_format="DYNAMIC",
    )
    for each in VERSIONS[:version]:
        for index in each.indexes:
            index.over(table)
    return table


# -- versions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Index:
    """An index, by the part of its name that follows the table's.

    A name is used once: an index with another condition, or on other columns, gets another name.
    """

    name: str
    columns: tuple[str, ...]
    where: Callable[[Table], ColumnElement[bool]]

    def over(self, table: Table) -> None:
        """Declare it."""
        where = self.where(table)
        Index(
            f"{table.name}_{self.name}",
            *(table.c[column] for column in self.columns),
            postgresql_where=where,
            sqlite_where=where,
        )


@dataclass(frozen=True, slots=True)
class Version:
    """The columns and indexes that a version of the table adds.

    Attributes:
        columns: Makes its new columns, which are nullable or have a server default, except in the first version.
        indexes: Its new indexes.
    """

    columns: Callable[[], Sequence[Column[Any]]]
    indexes: tuple[_Index, ...] = ()


def _first_columns() -> Sequence[Column[Any]]:
    blob = LargeBinary().with_variant(mysql.LONGBLOB(), *MYSQL_NAMES)
    return (
        Column("message_id", ExactText(255), primary_key=True),
        Column("task_name", ExactText(255), primary_key=True),
        Column("status", String(16), nullable=False),
        Column("processed_status", String(16)),
        Column("created_timestamp", UtcTimestamp(), nullable=False),
        Column("processed_timestamp", UtcTimestamp()),
        Column("task_id", ExactText(255), nullable=False),
        Column("queue", ExactText(255)),
        Column("fingerprint", ExactText(64)),
        Column("attempt", Integer, nullable=False),
        Column("token", BigInteger, nullable=False),
        # The last claimant since the message was recorded; null if it was never claimed.
        Column("worker", ExactText(255)),
        # Null unless processing.
        Column("lease_expires_at", UtcTimestamp()),
        Column("available_at", UtcTimestamp()),
        Column("published_at", UtcTimestamp()),
        Column("expires_at", UtcTimestamp()),
        Column("duplicates", Integer, nullable=False),
        Column("takeovers", Integer, nullable=False),
        Column("ran_task_id", ExactText(255)),
        Column("message", blob),
        Column("result", blob),
        # Null unless the body took steps.
        Column("steps", blob),
        Column("error", ErrorText()),
    )


#: Every version of the table, the newest last.
VERSIONS: tuple[Version, ...] = (
    Version(
        _first_columns,
        # What recovery reads besides the key: two indexes, since each costs every message. In both, what is looked for stands together,
        # so that a pass costs what it finds and what runs, however long the log or the backlog is, where an index cannot be partial too.
        # None is over the lease: it would be written at each renewal, to find what is among the rows that run anyway.
        (
            # What is not done. The condition is not on the status, which other statements name with the key: while few rows were
            # running PostgreSQL would plan to look for a row among them rather than by its key, and keep to it when there are many.
            _Index("open", ("status", "queue", "published_at"), lambda table: table.c.processed_timestamp.is_(None)),
            # What is done, by its age; and at the other end, not done and never published, what waits for the relay.
            _Index(
                "processed",
                ("processed_timestamp", "published_at"),
                lambda table: or_(table.c.processed_timestamp.is_not(None), table.c.published_at.is_(None)),
            ),
        ),
    ),
)
