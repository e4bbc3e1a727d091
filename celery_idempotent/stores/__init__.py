"""Stores: implementations of the port in :mod:`celery_idempotent.core.store`."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from celery_idempotent.core.store import Store

if TYPE_CHECKING:
    from sqlalchemy import URL

__all__ = ["open_store"]

#: The group of entry points for stores of other packages: each is named like its URL's scheme, and called with the URL and ``table=``.
STORES = "celery_idempotent.stores"

_OF_SQL = {"postgres", "postgresql", "mysql", "mariadb", "sqlite"}
_OF_REDIS = {"redis", "rediss", "redis+socket", "unix", "sentinel", "redis+cluster", "rediss+cluster"}


def open_store(url: str | URL, *, table: str = "queue_log") -> Store:
    """Open the store that a URL names. Nothing is connected yet.

    Args:
        url: ``postgresql://``, ``mysql://``, ``mariadb://`` or ``sqlite://``, as SQLAlchemy writes them; without a driver
            psycopg and PyMySQL are meant. With an asynchronous driver (``postgresql+asyncpg://``), an installed synchronous one is used in its
            place. ``postgres://`` is understood. Or ``redis://``, ``rediss://`` (TLS),
            ``redis+socket://``, ``sentinel://`` or ``redis+cluster://``. Or SQLAlchemy's ``URL``. In a Django project ``django://``
            and an alias. Or a scheme for which a package has an entry point in the group ``celery_idempotent.stores``.
        table: The table's name, or ``schema.name``; in Redis, what all keys begin with.

    Raises:
        ConfigurationError: The URL is not valid, names no kind of store there is, or its driver is not installed.
    """
    # On first use: SQLAlchemy takes a while to import, and a module may only declare its tasks.
    scheme = url.partition("://")[0] if isinstance(url, str) else url.drivername
    if scheme in _OF_REDIS and isinstance(url, str):
        from celery_idempotent.stores.redis import RedisStore

        return RedisStore(url, table=table)
    if scheme.partition("+")[0] not in _OF_SQL:  # a search of all installed packages takes milliseconds
        for found in entry_points(group=STORES, name=scheme):
            store: Store = found.load()(url, table=table)
            return store
    from celery_idempotent.stores.sql import SQLStore

    return SQLStore(url, table=table)
