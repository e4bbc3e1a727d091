"""What differs between databases: one strategy object each."""

from __future__ import annotations

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.stores.sql.dialects.base import Dialect, Fault
from celery_idempotent.stores.sql.dialects.mysql import MySQL
from celery_idempotent.stores.sql.dialects.postgresql import PostgreSQL
from celery_idempotent.stores.sql.dialects.sqlite import SQLite

__all__ = ["Dialect", "Fault", "dialect_named"]

_DIALECTS: dict[str, type[Dialect]] = {
    name: dialect for dialect in (PostgreSQL, MySQL, SQLite) for name in dialect.names
}


def dialect_named(name: str) -> Dialect:
    """Return the strategy for a database, by the name SQLAlchemy has for its dialect.

    Raises:
        ConfigurationError: The queue log cannot live in such a database.
    """
    try:
        return _DIALECTS[name]()
    except KeyError:
        raise ConfigurationError(
            f"the queue log cannot live in {name!r}: use PostgreSQL, MySQL, MariaDB or SQLite"
        ) from None
