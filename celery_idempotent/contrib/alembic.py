"""Create and change the queue log's table in Alembic migrations, and keep it out of autogenerate.

A migration names the version of the table that it leads to, and always does the same::

    from celery_idempotent.contrib import alembic as queue_log


    def upgrade() -> None:
        queue_log.upgrade(op, 1)


    def downgrade() -> None:
        queue_log.downgrade(op, 0, since=1)

This module does not import Alembic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from sqlalchemy import Connection, MetaData

from celery_idempotent.stores.sql.migrations import Statement, check_version, present_in, statements_back, statements_to
from celery_idempotent.stores.sql.online import alone, execute
from celery_idempotent.stores.sql.schema import statements
from celery_idempotent.stores.sql.table import table_of_version

__all__ = ["apart_from", "downgrade", "upgrade"]

#: Alembic's ``include_object``: takes an object, its name, its kind, whether it was reflected, and its counterpart.
IncludeObject = Callable[[Any, str | None, str, bool, Any], bool]


def upgrade(op: Any, version: int, *, since: int = 0, table: str = "queue_log", schema: str | None = None) -> None:
    """Bring the table to a version: create it, or add what it lacks. Parts that already exist, as after ``init``, stay as they are.

    An existing table is changed online, as by ``celery -A proj idempotent init``. On PostgreSQL this cannot run in a transaction. So the
    migration's own transaction is committed before, and another one begins after. Give such a step its own migration.

    Args:
        op: Alembic's ``op``.
        version: The version; "Create and upgrade the table" says what each is.
        since: The version that the migration before this one led to; 0 if there was none. Only needed for ``--sql``; otherwise the
            version is read.
        table: The table's name, as in the setting ``idempotent_table``.
        schema: The schema or database of the table; ``None`` for the connection's default.

    Raises:
        ConfigurationError: This version of the library has no such version of the table.
        SchemaError: A table of that name has no known version; it is not touched.
    """
    check_version(version)
    check_version(since)
    context = op.get_context()
    if context.as_sql:
        _write(op, statements_to(version, table, schema, present_in(since, table)))
        return
    declared = table_of_version(version, MetaData(), table, schema)

    alters = any(statement.alters for statement in statements(op.get_bind(), declared, version))
    with _outside(context) if alters else nullcontext():
        connection: Connection = op.get_bind()
        with alone(connection, declared):
            for statement in statements(connection, declared, version):
                execute(connection, statement)


def downgrade(op: Any, version: int, *, since: int, table: str = "queue_log", schema: str | None = None) -> None:
    """Take the table back to an older version. Hazard: version 0 drops it, with all message ids that are taken.

    This is rarely needed, because code of the version before works with the newer table.

    Args:
        op: Alembic's ``op``.
        version: The version to go back to.
        since: The version that the migration led to.
        table: The table's name.
        schema: The schema or database of the table.

    Raises:
        ConfigurationError: There is no such version.
    """
    check_version(version)
    check_version(since)
    context = op.get_context()
    back = list(statements_back(since, version, table, schema))
    if context.as_sql:
        _write(op, back)
        return
    with _outside(context) if version else nullcontext():
        connection = op.get_bind()
        with alone(connection, table_of_version(since, MetaData(), table, schema)):
            for statement in back:
                execute(connection, statement)


def apart_from(
    table: str = "queue_log", schema: str | None = None, *, otherwise: IncludeObject | None = None
) -> IncludeObject:
    """Return an ``include_object`` that keeps the queue log out of autogenerate.

    For ``context.configure(include_object=apart_from())`` in ``env.py``.

    Args:
        table: The table's name.
        schema: The schema or database of the table.
        otherwise: Your own ``include_object``, for everything else.
    """

    def include_object(thing: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:
        if type_ == "table" and name == table and thing.schema == schema:
            return False
        return otherwise is None or otherwise(thing, name, type_, reflected, compare_to)

    return include_object


def _write(op: Any, written: Iterable[Statement]) -> None:
    """Print the statements, for `--sql`; those that need no transaction go between two transactions."""
    written = list(written)
    context = op.get_context()
    with _outside(context) if any(statement.alters for statement in written) else nullcontext():
        for statement in written:
            op.execute(statement.ddl)


@contextmanager
def _outside(context: Any) -> Iterator[None]:
    """Leave the migration's transaction for the block, if there is one."""
    if context.dialect.name != "postgresql":
        yield
        return
    with context.autocommit_block():
        yield
