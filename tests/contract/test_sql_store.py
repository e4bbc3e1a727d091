"""The contract of a store, met by the SQL store on every kind of database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa

from celery_idempotent.core.store import Store
from celery_idempotent.stores import open_store
from celery_idempotent.stores.sql import queue_log_table
from celery_idempotent.testing import StoreContract, TransactionContract


@pytest.fixture(scope="module")
def engine() -> Iterator[Callable[[str], sa.Engine]]:
    """Yield an engine per URL, to make and drop tables with."""
    engines: dict[str, sa.Engine] = {}

    def engine(url: str) -> sa.Engine:
        return engines.setdefault(url, sa.create_engine(url, isolation_level="AUTOCOMMIT"))

    yield engine
    for each in engines.values():
        each.dispose()


def table_of_its_own(engine: sa.Engine) -> Iterator[Callable[[], Store]]:
    """Yield what opens handles on a table that is dropped in the end."""
    table = queue_log_table(sa.MetaData(), f"contract_{uuid4().hex[:12]}")
    table.create(engine)
    yield partial(open_store, engine.url.render_as_string(hide_password=False), table=table.name)
    table.drop(engine)


class TestSQLite(StoreContract, TransactionContract):
    @pytest.fixture
    def open_store_again(self, tmp_path: Path) -> Callable[[], Store]:
        # Not initialised: the table is made on first use.
        return partial(open_store, f"sqlite:///{tmp_path / 'queue_log.db'}")


class TestPostgreSQL(StoreContract, TransactionContract):
    @pytest.fixture
    def open_store_again(
        self, postgresql_url: str, engine: Callable[[str], sa.Engine]
    ) -> Iterator[Callable[[], Store]]:
        yield from table_of_its_own(engine(postgresql_url))


class TestMariaDB(StoreContract, TransactionContract):
    @pytest.fixture
    def open_store_again(self, mariadb_url: str, engine: Callable[[str], sa.Engine]) -> Iterator[Callable[[], Store]]:
        yield from table_of_its_own(engine(mariadb_url))
