"""Return the table's statements as text, for a DBA who changes the database by hand."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Dialect
from sqlalchemy.dialects import mysql, postgresql, sqlite

from celery_idempotent.core.store import Change
from celery_idempotent.stores.sql.migrations import check_version, newest, present_in, statements_to

__all__ = ["changes_between"]


def changes_between(since: int, *, dialect: str, name: str, schema: str | None) -> list[Change]:
    """Return the changes that take a table of one version to this version.

    Args:
        since: The version; 0 if there is no table.
        dialect: ``postgresql``, ``mariadb``, ``mysql`` or ``sqlite``.
        name: The table's name.
        schema: The schema or database of the table; ``None`` for the connection's.

    Raises:
        ConfigurationError: There is no such version.
    """
    check_version(since)
    speaker = _dialect(dialect)
    return [statement.change(speaker) for statement in statements_to(newest(), name, schema, present_in(since, name))]


def _dialect(name: str) -> Dialect:
    made: Any = {"postgresql": postgresql, "sqlite": sqlite}.get(name, mysql).dialect()
    if name == "mariadb":
        made.is_mariadb = True
    return made  # type: ignore[no-any-return]
