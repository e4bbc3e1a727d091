"""Whether the table is there with every column of this version, and making it.

By inspection of what the database has, so that a table made by a migration of one's own serves as well.
"""

from __future__ import annotations

from sqlalchemy import Connection, Table, inspect
from sqlalchemy.exc import DBAPIError, NoSuchTableError
from sqlalchemy.schema import CreateIndex, CreateTable

from celery_idempotent.errors import SchemaError

__all__ = ["create", "is_there", "verify"]

_INIT = "`celery -A proj idempotent init`"


def verify(connection: Connection, table: Table) -> None:
    """Compare the database's table with this version's.

    Raises:
        SchemaError: It is missing, or lacks columns.
    """
    missing = _missing_columns(connection, table)
    if missing is None:
        raise SchemaError(f"the table {table.fullname} is missing; run {_INIT}")
    if missing:
        raise SchemaError(
            f"the table {table.fullname} lacks {', '.join(missing)}: it is not of this version and was not touched; "
            f"add the columns by a migration, or rename it and run {_INIT}"
        )


def is_there(connection: Connection, table: Table) -> bool:
    """Whether there is a table of that name, whatever its columns."""
    return _missing_columns(connection, table) is not None


def create(connection: Connection, table: Table) -> bool:
    """Make the table and its indexes, whatever is missing; any number of processes at once.

    Returns:
        Whether anything was made.

    Raises:
        SchemaError: A table of that name lacks columns; it is not touched.
    """
    made = False
    if _missing_columns(connection, table) is None:
        made = _make(connection, CreateTable(table, if_not_exists=True))
    verify(connection, table)
    present = {
        tuple(index["column_names"]) for index in inspect(connection).get_indexes(table.name, schema=table.schema)
    }
    for index in table.indexes:
        if tuple(column.name for column in index.columns) not in present:
            # Without IF NOT EXISTS, which MySQL has not got.
            made = _make(connection, CreateIndex(index)) or made
    return made


def _make(connection: Connection, statement: CreateTable | CreateIndex) -> bool:
    """Execute it, unless somebody else does the same at the same time."""
    try:
        connection.execute(statement)
    except DBAPIError as error:
        # "already exists" has many faces; PostgreSQL's, when two create at once, is a unique violation in its catalogue.
        text = str(error.orig).lower()
        if not any(face in text for face in ("already exists", "duplicate key")):
            raise
        return False
    return True


def _missing_columns(connection: Connection, table: Table) -> list[str] | None:
    """The columns that the database's table lacks; ``None`` when there is no such table."""
    try:
        present = {column["name"] for column in inspect(connection).get_columns(table.name, schema=table.schema)}
    except NoSuchTableError:
        return None
    # A table without columns is how some dialects report one that is not there.
    return [column.name for column in table.columns if column.name not in present] if present else None
