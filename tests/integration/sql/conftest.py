"""What the tests of the SQL store share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from celery_idempotent.stores.sql import SQLStore
from tests.integration.sql.wire import Wire


@pytest.fixture
def store(store_url: str) -> Iterator[SQLStore]:
    """Yield a store of the test's own, its table made and looked at; on SQLite, PostgreSQL and MariaDB in turn."""
    store = SQLStore(store_url)
    store.init()
    store.counts()
    yield store
    store.close()


@pytest.fixture
def wire(store_url: str) -> Iterator[Wire]:
    """Yield a wire to the database of ``store_url``, which has to be a server's."""
    with Wire(store_url) as wire:
        yield wire


@pytest.fixture
def wired(store: SQLStore, wire: Wire) -> Iterator[SQLStore]:
    """Yield a store at the other end of the wire, which has already been used, so that its connection is in the pool."""
    wired = SQLStore(wire.url)
    wired.counts()
    yield wired
    wired.close()


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
