"""What the tests of the SQL store share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from celery_idempotent.stores.sql import SQLStore
from tests.support.wire_tap import WireTap


@pytest.fixture
def store(store_url: str) -> Iterator[SQLStore]:
    """Yield a store of the test's own, its table made and looked at; on SQLite, PostgreSQL and MariaDB in turn."""
    store = SQLStore(store_url)
    store.init()
    store.counts()
    yield store
    store.close()


@pytest.fixture
def wire_tap(store_url: str) -> Iterator[WireTap]:
    """Yield a wire tap to the database of ``store_url``, which has to be a server's."""
    with WireTap(store_url) as wire_tap:
        yield wire_tap


@pytest.fixture
def tapped_store(store: SQLStore, wire_tap: WireTap) -> Iterator[SQLStore]:
    """Yield a store at the other end of the wire tap, which has already been used, so that its connection is in the pool."""
    tapped_store = SQLStore(wire_tap.url)
    tapped_store.counts()
    yield tapped_store
    tapped_store.close()


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """Yield the statements that any engine of this process executes, as the driver is given them."""
    executed: list[str] = []

    def note(
        connection: object, cursor: object, statement: str, parameters: object, context: object, executemany: bool
    ) -> None:
        executed.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    yield executed
    sa.event.remove(sa.Engine, "before_cursor_execute", note)
