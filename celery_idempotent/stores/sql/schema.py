"""Check that the table has every column of this version, create it, or upgrade an older one.

It reads the database's catalogue, so a table that a migration created serves as well. ADR 12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sqlalchemy import Connection, MetaData, Table, inspect
from sqlalchemy.exc import NoSuchTableError

from celery_idempotent.core.store import Change
from celery_idempotent.errors import SchemaError
from celery_idempotent.stores.sql.migrations import (
    AddColumn,
    OnlineIndex,
    Present,
    Statement,
    at_once,
    newest,
    statements_to,
)
from celery_idempotent.stores.sql.online import alone, broken_indexes, execute, partitions, seen_at_once

__all__ = ["create", "is_there", "outstanding", "statements", "verify"]

_INIT = "`celery -A proj idempotent init`"


def verify(connection: Connection, table: Table) -> None:
    """Compare the columns of the database's table with this version's. Indexes are not needed: all works without them, if slowly.

    Raises:
        SchemaError: It is missing, or lacks columns.
    """
    columns = _columns(connection, table)
    if columns is None:
        raise SchemaError(f"the table {table.fullname} is missing; run {_INIT}")
    if missing := [column.name for column in table.columns if column.name not in columns]:
        list(statements_to(newest(), table.name, table.schema, Present(columns)))  # which refuses a table of no version
        raise SchemaError(
            f"the table {table.fullname} lacks {', '.join(missing)}: it is of an older version; run {_INIT}, or your migration"
        )


def is_there(connection: Connection, table: Table) -> bool:
    """Return whether there is a table of that name, with any columns."""
    return _columns(connection, table) is not None


def outstanding(connection: Connection, table: Table) -> list[Change]:
    """Return the changes that :func:`create` would make.

    Raises:
        SchemaError: A table of that name is of no version.
    """
    with seen_at_once(connection):
        return [statement.change(connection.dialect) for statement in statements(connection, table, newest())]


def create(connection: Connection, table: Table, before: Callable[[Change], None] | None = None) -> bool:
    """Create the table, or add what it lacks. Any number of processes may do this at once.

    Args:
        connection: In autocommit; on SQLite, all is done in one transaction.
        table: This version's.
        before: Called before each change.

    Returns:
        Whether anything was made or changed.

    Raises:
        SchemaError: A table of that name is of no version; it is not touched.
    """
    with seen_at_once(connection):
        if not statements(connection, table, newest()):
            return False
    changed = False
    with alone(connection, table):
        for statement in statements(connection, table, newest()):
            if before is not None:
                before(statement.change(connection.dialect))
            changed = execute(connection, statement) or changed
    verify(connection, table)
    return changed


def statements(connection: Connection, table: Table, version: int) -> list[Statement]:
    """Return the statements that take the database's table to a version.

    Raises:
        SchemaError: A table of that name is of no version.
    """
    whole = list(statements_to(version, table.name, table.schema, _present(connection, table)))
    if any(statement.alters for statement in whole) and (parts := partitions(connection, table)):
        return list(_by_parts(connection, whole, parts, version))
    return whole


def _by_parts(
    connection: Connection, whole: list[Statement], parts: list[tuple[str, str]], version: int
) -> Iterator[Statement]:
    """Yield the statements for a table in partitions. PostgreSQL builds an index on all of them only by locking out writers.

    So it is built on each partition first. An index over all then takes those for its parts, in a moment.
    """
    of_parts = any(isinstance(statement.ddl, OnlineIndex) for statement in whole)
    for statement in whole:
        if of_parts and not isinstance(statement.ddl, AddColumn):
            of_parts = False
            for schema, name in parts:
                part = Table(name, MetaData(), schema=schema)
                for each in statements_to(version, name, schema, _present(connection, part)):
                    if not isinstance(each.ddl, AddColumn):  # which a partition has of the table
                        yield each
        yield at_once(statement)


def _present(connection: Connection, table: Table) -> Present | None:
    """Return the columns and indexes that the table has; ``None`` if there is no such table."""
    columns = _columns(connection, table)
    if columns is None:
        return None
    broken = broken_indexes(connection, table)
    found = inspect(connection).get_indexes(table.name, schema=table.schema)
    indexes = {str(index["name"]): tuple(index["column_names"]) for index in found if index["name"] not in broken}
    return Present(columns, indexes, broken)


def _columns(connection: Connection, table: Table) -> frozenset[str] | None:
    try:
        found = inspect(connection).get_columns(table.name, schema=table.schema)
    except NoSuchTableError:
        return None
    # Some dialects report a missing table as one without columns.
    return frozenset(column["name"] for column in found) or None
