"""A purge costs what it deletes, regardless of earlier deletions and of kept rows."""

from __future__ import annotations

import sqlalchemy as sa

from celery_idempotent.core.records import MessageKey
from celery_idempotent.stores.sql import SQLStore, queue_log_table
from celery_idempotent.testing.examples import processing
from tests.integration.stores.sql import plans

#: Rows that are kept for longer than retention (`unique_for`), and those after them that are not.
KEPT, DUE = 300, 90


def done(store: SQLStore, number: int, *, kept: bool) -> None:
    claim = processing(store, key=MessageKey(f"m{number:04}", "t"))
    assert store.complete(claim, result=None, unique_for=3600.0 if kept else None)


def test_kept_rows_are_read_by_the_first_batch_alone(store: SQLStore) -> None:
    for number in range(KEPT + DUE):
        done(store, number, kept=number < KEPT)
    watched = plans.watch(store.engine)[0]
    purging = SQLStore(watched.engine)
    purging.check()
    efforts = []
    for _ in range(DUE // 30):
        watched.seen.clear()
        assert purging.purge(older_than=0.0, limit=30) == 30
        efforts.append(watched.seen[0].effort)
    assert purging.purge(older_than=0.0, limit=30) == 0
    watched.engine.dispose()

    if store.engine.dialect.name != "sqlite":  # which counts hundreds of instructions, of which these are too few
        assert efforts[0] >= KEPT
        assert max(efforts[1:]) < KEPT / 2


def test_a_kept_row_is_purged_once_its_id_is_free(store: SQLStore) -> None:
    for number in range(40):
        done(store, number, kept=number < 10)
    assert store.purge(older_than=0.0, limit=30) == 30
    table = queue_log_table(sa.MetaData())
    with store.engine.begin() as connection:
        connection.execute(sa.update(table).values(expires_at=table.c.created_timestamp))

    assert [store.purge(older_than=0.0, limit=30) for _ in range(2)] == [10, 0]
