"""What the page "Past one server" says to type, typed; its partitions are in ``tests/integration/stores/sql/test_partitions.py``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa

from celery_idempotent.core.records import RowFilter
from celery_idempotent.stores.sql import SQLStore
from tests.support.apps import close_app
from tests.support.stores import postgresql_store
from tests.support.worker import ROOT

PAGE = (ROOT / "docs" / "how-to" / "scale.md").read_text()


def block(name: str) -> str:
    """Return the example that begins with a comment of this name."""
    found = re.search(rf"```\w+\n(?:#|--) {re.escape(name)}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def shards(postgresql_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield the module ``shards``, whose addresses are ours."""
    with ExitStack() as stack:
        text = block("shards.py").replace("redis://localhost", "memory://", 1).replace("redis://localhost", redis_url)
        for shown in ("postgresql://db-0/shop", "postgresql://db-1/shop"):
            assert shown in text
            text = text.replace(shown, stack.enter_context(postgresql_store(postgresql_url)))
        module = ModuleType("shards")
        exec(compile(text, "shards.py", "exec"), vars(module))
        monkeypatch.setitem(sys.modules, "shards", module)
        for app in module.apps:
            app.finalize()
            app.queue_log.init()
        yield module
        for app in module.apps:
            close_app(app)


def test_a_call_is_known_where_its_customer_is_at_home(shards: Any) -> None:
    exec(block("a producer"), {})
    again = shards.at_home_of("c-48213").tasks["shop.charge"].delay("o-1", 500)
    assert again.duplicate

    for number in range(20):
        shards.at_home_of(f"c-{number}").tasks["shop.charge"].delay(f"order of {number}", 1)
    logs = [{row.key.message_id for row in app.queue_log.store.rows(RowFilter())} for app in shards.apps]
    assert sum(map(len, logs)) == 21
    assert all(logs)
    assert not logs[0] & logs[1]


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_the_settings_of_vacuum_are_taken(store_url: str) -> None:
    with closing(SQLStore(store_url)) as store:
        store.init()
        with store.engine.begin() as connection:
            connection.execute(sa.text(block("vacuum")))
            options = connection.execute(sa.text("SELECT reloptions FROM pg_class WHERE oid = 'queue_log'::regclass"))
            assert "autovacuum_vacuum_scale_factor=0.02" in options.scalar_one()
