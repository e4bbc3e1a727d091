"""A place for one test's tables: a schema or a database of its own on a shared server, or a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import sqlalchemy as sa

__all__ = ["STORES", "mariadb_store", "postgresql_store", "sqlite_store"]

#: Every kind of store that the fixture ``store_url`` may be parametrized with.
STORES = ("sqlite", "postgresql", "mariadb")


def sqlite_store(directory: Path) -> str:
    """Return the URL of a file that is not there yet."""
    return f"sqlite:///{directory / 'store.db'}"


@contextmanager
def postgresql_store(url: str) -> Iterator[str]:
    """Yield the URL of an empty schema, dropped in the end with all that is in it.

    The URL says it all (``search_path``), so whatever is given it, in whatever process, sees these tables and no others.
    """
    schema = f"test_{uuid4().hex[:12]}"
    with _administering(url) as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {schema}"))
    yield (
        sa.make_url(url).update_query_dict({"options": f"-csearch_path={schema}"}).render_as_string(hide_password=False)
    )
    with _administering(url) as connection:
        connection.execute(sa.text(f"DROP SCHEMA {schema} CASCADE"))


@contextmanager
def mariadb_store(url: str) -> Iterator[str]:
    """Yield the URL of an empty database, dropped in the end."""
    database = f"test_{uuid4().hex[:12]}"
    with _administering(url) as connection:
        connection.execute(sa.text(f"CREATE DATABASE {database} CHARACTER SET utf8mb4"))
    yield sa.make_url(url).set(database=database).render_as_string(hide_password=False)
    with _administering(url) as connection:
        connection.execute(sa.text(f"DROP DATABASE {database}"))


@contextmanager
def _administering(url: str) -> Iterator[sa.Connection]:
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        yield connection
    engine.dispose()
