"""How the databases carry the statements out: through an index, whatever the size of the log."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from celery_idempotent.records import MessageKey, NewMessage, RowFilter
from celery_idempotent.stores.sql import SQLStore, queue_log_table
from celery_idempotent.testing.examples import claim, processing

ROWS = 3000


@pytest.fixture
def long_log(store: SQLStore) -> SQLStore:
    """A log of thousands of finished messages, hundreds of pending ones, and one that runs."""
    table = queue_log_table(sa.MetaData())
    now = sa.func.current_timestamp() if store.engine.dialect.name != "sqlite" else "2026-01-01 00:00:00.000000"
    blank = {column.name: None for column in table.c}
    common = {"task_name": "t", "task_id": "x", "attempt": 0, "token": 1, "duplicates": 0, "takeovers": 0}
    with store.engine.begin() as connection:
        for status, count in (("done", ROWS), ("pending", ROWS // 10)):
            rows = [
                {**blank, **common, "message_id": f"{status}:{number:05}", "status": status} for number in range(count)
            ]
            insert = sa.insert(sa.table("queue_log", *(sa.column(name) for name in blank)))
            insert = insert.values(
                {name: sa.bindparam(name) for name in blank} | {"created_timestamp": now, "published_at": now}
            )
            for row in rows:
                del row["created_timestamp"], row["published_at"]
            connection.execute(insert, rows)
        connection.execute(
            sa.text("UPDATE queue_log SET processed_timestamp = created_timestamp WHERE status = 'done'")
        )
        connection.execute(
            sa.text("ANALYZE queue_log" if connection.dialect.name != "mysql" else "ANALYZE TABLE queue_log")
        )
    processing(store, key=MessageKey("running", "t"))
    return store


@pytest.fixture
def plans() -> Iterator[list[str]]:
    """The plan of every UPDATE and SELECT on the queue log, by the database itself, before it is carried out."""
    seen: list[str] = []

    def explain(
        connection: sa.Connection, cursor: object, statement: str, parameters: object, context: object, many: bool
    ) -> None:
        if not statement.startswith(("UPDATE queue_log", "SELECT queue_log", "DELETE FROM queue_log")):
            return
        prefix = "EXPLAIN QUERY PLAN " if connection.dialect.name == "sqlite" else "EXPLAIN "
        driver = connection.connection.cursor()
        driver.execute(prefix + statement, parameters)  # type: ignore[arg-type]
        seen.append("\n".join(" ".join(map(str, line)) for line in driver.fetchall()))
        driver.close()

    sa.event.listen(sa.Engine, "before_cursor_execute", explain)
    yield seen
    sa.event.remove(sa.Engine, "before_cursor_execute", explain)


def uses(plan: str, index: str, dialect: str) -> bool:
    """Whether the plan finds its rows by the index, looking at a fraction of the table."""
    match dialect:
        case "postgresql":
            return f"using queue_log_{index}" in plan or f"on queue_log_{index}" in plan
        case "sqlite":
            name = "sqlite_autoindex_queue_log_1" if index == "pkey" else f"queue_log_{index}"
            return f"USING INDEX {name}" in plan
        case _:
            name = "PRIMARY" if index == "pkey" else f"queue_log_{index}"
            # The column `key`, after `possible_keys`, which names it too.
            return plan.count(name) >= 2


def test_every_verb_finds_its_row_by_the_key(long_log: SQLStore, plans: list[str]) -> None:
    key = MessageKey("pending:00042", "t")

    held = claim(long_log, NewMessage(key, "x"))
    long_log.renew([held], lease=60.0)
    long_log.checkpoint(held, result=b"1")
    long_log.complete(held, result=None)
    long_log.count_duplicate(key)
    assert long_log.find(key) is not None

    assert len(plans) == 6
    for plan in plans:
        assert uses(plan, "pkey", long_log.engine.dialect.name), plan


def test_recovery_reads_what_it_needs_by_its_indexes(long_log: SQLStore, plans: list[str]) -> None:
    dialect = long_log.engine.dialect.name
    long_log.lapsed(again_after=60.0, limit=10)
    long_log.waiting(older_than=60.0, limit=10)
    long_log.purge(older_than=3600.0 * 24 * 365 * 20, limit=10)

    for plan, index in zip(plans, ("lease_expires_at", "published_at", "processed_timestamp"), strict=True):
        assert uses(plan, index, dialect), f"{index}: {plan}"


def test_listings_are_limited_by_the_database(long_log: SQLStore, statements: list[str]) -> None:
    assert len(list(long_log.rows(RowFilter(limit=7)))) == 7
    assert "LIMIT" in statements[-1]
