"""The statements that take the table from one version to another, for a database that was inspected or for one that was not."""

# ruff: noqa: ARG001 - signatures are SQLAlchemy's

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Column, Dialect, MetaData, Table
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import CreateIndex, CreateTable, DDLElement, DropIndex, DropTable
from sqlalchemy.sql.compiler import DDLCompiler

from celery_idempotent.core.store import Change
from celery_idempotent.errors import ConfigurationError, SchemaError
from celery_idempotent.stores.sql import table as tables
from celery_idempotent.stores.sql.clock import MYSQL_NAMES
from celery_idempotent.stores.sql.table import table_of_version

__all__ = [
    "AddColumn",
    "OnlineIndex",
    "Present",
    "Statement",
    "at_once",
    "check_version",
    "is_online",
    "newest",
    "present_in",
    "statements_back",
    "statements_to",
]

_CONCURRENTLY = "postgresql_concurrently"


@dataclass(frozen=True, slots=True)
class Present:
    """The columns and indexes that a database has of a table.

    Attributes:
        columns: Their names.
        indexes: The columns of each index, by its name.
        broken: Names of indexes whose build did not finish, so that they are useless.
    """

    columns: frozenset[str]
    indexes: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    broken: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement about the table.

    Attributes:
        what: What it does, for people.
        ddl: The statement.
        alters: Whether it changes an existing table, which may be large and in use.
    """

    what: str
    ddl: DDLElement
    alters: bool = True

    def change(self, dialect: Dialect) -> Change:
        """Return the same in words and text."""
        return Change(self.what, self.text(dialect), self.alters)

    def text(self, dialect: Dialect) -> str:
        """Return the statement as text, in the database's SQL."""
        lines = str(self.ddl.compile(dialect=dialect)).strip().splitlines()
        return "\n".join(line.rstrip().expandtabs(4) for line in lines)


def newest() -> int:
    """Return the table's version in this version of the library."""
    return len(tables.VERSIONS)


def check_version(number: int) -> None:
    """Refuse a version of the table that does not exist; 0 is no table.

    Raises:
        ConfigurationError: It is not known here.
    """
    if not 0 <= number <= newest():
        raise ConfigurationError(
            f"there is no version {number} of the table: this version of celery-idempotent has {newest()}"
        )


def present_in(version: int, name: str) -> Present | None:
    """Return what a database has after a table was created in a version; nothing for version 0."""
    if version == 0:
        return None
    table = table_of_version(version, MetaData(), name, None)
    return Present(
        frozenset(table.columns.keys()),
        {str(index.name): tuple(index.columns.keys()) for index in table.indexes},
    )


def statements_to(version: int, name: str, schema: str | None, present: Present | None) -> Iterator[Statement]:
    """Yield the statements that give a table all that a version has.

    Raises:
        SchemaError: It lacks columns of the first version, so it is none of ours.
    """
    table = table_of_version(version, MetaData(), name, schema)
    if present is None:
        yield Statement(f"create the table {table.fullname}", CreateTable(table, if_not_exists=True), alters=False)
        for index in _sorted(table):
            yield Statement(f"create the index {index.name}", CreateIndex(index), alters=False)
        return
    missing = [column for column in table.columns if column.name not in present.columns]
    first = {column.name for column in tables.VERSIONS[0].columns()}
    if foreign := [column.name for column in missing if column.name in first]:
        raise SchemaError(
            f"the table {table.fullname} lacks {', '.join(foreign)}: it is of no version and was not touched; "
            f"add the columns by a migration, or rename it and run `celery -A proj idempotent init`"
        )
    for column in missing:
        yield Statement(f"add the column {column.name} to {table.fullname}", AddColumn(column))
    for index in _sorted(table):
        # By its columns: an index of another name, from a migration, serves as well.
        if tuple(index.columns.keys()) in present.indexes.values():
            continue
        if index.name in present.broken:
            yield Statement(f"drop the index {index.name}, which was not built to the end", _online(DropIndex(index)))
        yield Statement(f"create the index {index.name}", _online(OnlineIndex(index)))


def statements_back(since: int, version: int, name: str, schema: str | None) -> Iterator[Statement]:
    """Yield the statements that take a table back to an older version; 0 drops it with all its rows."""
    before = table_of_version(since, MetaData(), name, schema)
    if version == 0:
        yield Statement(f"drop the table {before.fullname}", DropTable(before))
        return
    after = table_of_version(version, MetaData(), name, schema)
    kept = {index.name for index in after.indexes}
    for index in _sorted(before):
        if index.name not in kept:
            yield Statement(f"drop the index {index.name}", _online(DropIndex(index)))
    for column in before.columns:
        if column.name not in after.columns:
            yield Statement(f"drop the column {column.name} of {before.fullname}", DropColumn(column))


def _sorted(table: Table) -> list[Any]:
    return sorted(table.indexes, key=lambda index: str(index.name))


# -- statements --------------------------------------------------------------------------------------------------------


class _OfColumn(DDLElement):
    """About one column of a table."""

    inherit_cache = False

    def __init__(self, column: Column[Any]) -> None:
        self.column = column


class AddColumn(_OfColumn):
    """``ALTER TABLE ... ADD COLUMN``. For a nullable column, or a constant default, it does not rewrite the table."""


class DropColumn(_OfColumn):
    """``ALTER TABLE ... DROP COLUMN``."""


class OnlineIndex(CreateIndex):
    """``CREATE INDEX`` that lets others write meanwhile."""


def _online(ddl: Any) -> Any:
    """Let others write meanwhile, which on PostgreSQL needs ``CONCURRENTLY``."""
    ddl.element.dialect_kwargs[_CONCURRENTLY] = True
    return ddl


def is_online(ddl: DDLElement) -> bool:
    """Return whether PostgreSQL lets others write meanwhile."""
    return isinstance(ddl, CreateIndex | DropIndex) and ddl.element.dialect_kwargs.get(_CONCURRENTLY) is True


def at_once(statement: Statement) -> Statement:
    """Return the same statement without ``CONCURRENTLY``: it takes only a moment, or PostgreSQL has no other way."""
    ddl = statement.ddl
    if is_online(ddl):
        assert isinstance(ddl, CreateIndex | DropIndex)
        ddl.element.dialect_kwargs[_CONCURRENTLY] = False
    return statement


@compiles(AddColumn)
def _add_column(element: AddColumn, compiler: DDLCompiler, **kw: Any) -> str:
    table = compiler.preparer.format_table(element.column.table)
    return f"ALTER TABLE {table} ADD COLUMN {compiler.get_column_specification(element.column)}"


@compiles(DropColumn)
def _drop_column(element: DropColumn, compiler: DDLCompiler, **kw: Any) -> str:
    table = compiler.preparer.format_table(element.column.table)
    return f"ALTER TABLE {table} DROP COLUMN {compiler.preparer.format_column(element.column)}"


@compiles(OnlineIndex)
def _online_index(element: OnlineIndex, compiler: DDLCompiler, **kw: Any) -> str:
    return str(compiler.visit_create_index(element, **kw))  # type: ignore[no-untyped-call]


@compiles(OnlineIndex, *MYSQL_NAMES)
def _online_index_mysql(element: OnlineIndex, compiler: DDLCompiler, **kw: Any) -> str:
    # InnoDB does this anyway. With these words, it refuses instead of locking the table.
    return f"{_online_index(element, compiler, **kw)} ALGORITHM=INPLACE LOCK=NONE"
