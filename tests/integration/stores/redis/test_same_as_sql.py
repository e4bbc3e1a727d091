"""Whatever is done to rows, in Redis they answer and become what they do in SQL."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from celery_idempotent import RedisStore, SQLStore
from celery_idempotent.core.records import (
    Claim,
    Duplicate,
    MessageKey,
    NotClaimed,
    ProcessedStatus,
    Row,
    RowFilter,
    Status,
)
from celery_idempotent.core.store import Store
from celery_idempotent.testing.examples import wait_until
from tests.integration.stores.redis.random_verbs import KEYS, call_random_verb


@pytest.fixture
def sql(tmp_path: Path) -> Iterator[SQLStore]:
    store = SQLStore(f"sqlite:///{tmp_path / 'store.db'}")
    yield store
    store.close()


def told(row: Row | None) -> dict[str, Any] | None:
    """Return a row without its moments: whether there are such, and on which side of now."""
    if row is None:
        return None
    values = {field.name: getattr(row, field.name) for field in fields(Row)}
    return {
        name: (value <= row.read_at) if isinstance(value, datetime) else value
        for name, value in values.items()
        if name != "read_at"
    }


def comparable(answer: object) -> object:
    if isinstance(answer, list):
        return [comparable(each) for each in answer]
    return (type(answer).__name__, told(answer.row)) if isinstance(answer, Duplicate | NotClaimed) else answer


def look(store: Store) -> dict[str, object]:
    """All that can be read of it, but for the order among what was done in the same moment."""

    def names(rows: list[Row]) -> list[MessageKey]:
        return sorted((row.key for row in rows), key=str)

    return {
        "rows": [told(store.find(key)) for key in KEYS],
        "counts": store.counts(),
        "lapsed": names(store.lapsed(again_after=3600.0, limit=10)),
        "lapsed again": names(store.lapsed(again_after=0.0, limit=10)),
        "waiting": names(store.waiting(older_than=0.0, limit=10)),
        "waiting on a": names(store.waiting(older_than=0.0, limit=10, before={"a": datetime(2100, 1, 1, tzinfo=UTC)})),
        "unsent": names(store.unsent(limit=10)),
        "newest": names(store.newest(limit=10)),
        "failed": names(list(store.rows(RowFilter(status=Status.DONE, processed_status=ProcessedStatus.FAILURE)))),
    }


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_the_same(store: RedisStore, sql: SQLStore, seed: int) -> None:
    chances = random.Random(seed), random.Random(seed)
    claims: tuple[dict[MessageKey, Claim], dict[MessageKey, Claim]] = {}, {}
    for _ in range(150):
        ours, theirs = call_random_verb(store, chances[0], claims[0]), call_random_verb(sql, chances[1], claims[1])
        assert comparable(ours) == comparable(theirs)
        assert [told(store.find(key)) for key in KEYS] == [told(sql.find(key)) for key in KEYS]
    # A moment of SQLite's is a millisecond.
    wait_until(lambda: look(store) == look(sql))
    wait_until(lambda: store.purge(older_than=0.0, limit=100) + sql.purge(older_than=0.0, limit=100) == 0)
    assert look(store) == look(sql)
