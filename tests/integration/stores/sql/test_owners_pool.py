"""An engine of the app's own, all of whose connections are taken by bodies: the store's statements do not wait for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa

from celery_idempotent.core.records import MessageKey
from celery_idempotent.stores.sql import SQLStore
from celery_idempotent.testing.examples import LEASE, claim, new_message, pending, processing

on_servers = pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)


@pytest.fixture
def engine(store_url: str, store: SQLStore) -> Iterator[sa.Engine]:
    """With as few connections as can be, and little patience."""
    engine = sa.create_engine(store_url, pool_size=2, max_overflow=0, pool_timeout=0.5)
    yield engine
    engine.dispose()


@on_servers
def test_neither_renewal_nor_claim_waits_for_bodies(engine: sa.Engine) -> None:
    owned = SQLStore(engine)
    with ExitStack() as bodies:
        for _ in range(2):
            bodies.enter_context(engine.connect())
        held = processing(owned)
        assert owned.renew([held], lease=LEASE) == []
        pending(owned, key=MessageKey("other", "t"))
        assert claim(owned, new_message(MessageKey("other", "t"))).token == 1
        assert owned.complete(held, result=b"1")
    owned.close()


@on_servers
def test_listeners_of_the_engine_hear_of_statements_but_of_no_transaction(engine: sa.Engine) -> None:
    heard: list[str] = []
    for name in ("begin", "commit", "rollback"):
        sa.event.listen(engine, name, lambda _, name=name: heard.append(name))
    sa.event.listen(engine, "before_cursor_execute", lambda *arguments: heard.append(arguments[2].split()[0]))
    owned = SQLStore(engine)
    processing(owned)
    assert "INSERT" in heard
    assert not {"begin", "commit", "rollback"} & set(heard)
    owned.close()


def test_an_engine_in_memory_stays_one_connection() -> None:
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool, connect_args={"check_same_thread": False})
    owned = SQLStore(engine)
    processing(owned)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM queue_log")).scalar() == 1
    engine.dispose()


def test_an_engine_without_a_pool_says_where_connections_come_from(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'queue_log.db'}", poolclass=sa.NullPool)
    owned = SQLStore(engine)
    processing(owned)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM queue_log")).scalar() == 1
    owned.close()
