"""How the databases carry the statements out: through an index, whatever the size of the log."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

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
    blank = {column.name: None for column in table.c}
    common = {"task_name": "t", "task_id": "x", "attempt": 0, "token": 1, "duplicates": 0, "takeovers": 0}

    def moment(number: int) -> object:
        """As the driver wants it: the insert knows no types."""
        moment = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
        if store.engine.dialect.name == "postgresql":
            return moment
        return moment.strftime("%Y-%m-%d %H:%M:%S.%f")

    with store.engine.begin() as connection:
        for status, count in (("done", ROWS), ("pending", ROWS // 10)):
            rows = [
                {
                    **blank,
                    **common,
                    "message_id": f"{status}:{number:05}",
                    "status": status,
                    # Most of what waits is another queue's.
                    "queue": "acb"[min(number % 10, 2)],
                    "created_timestamp": moment(number),
                    "published_at": moment(number),
                    **({"processed_timestamp": moment(number), "worker": "w:1"} if status == "done" else {}),
                }
                for number in range(count)
            ]
            insert = sa.insert(sa.table("queue_log", *(sa.column(name) for name in blank)))
            connection.execute(insert.values({name: sa.bindparam(name) for name in blank}), rows)
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
        if not statement.startswith(("UPDATE queue_log", "SELECT queue_log", "SELECT min(", "DELETE FROM queue_log")):
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
    moment = datetime(2100, 1, 1, tzinfo=UTC)
    long_log.lapsed(again_after=60.0, limit=10)
    long_log.waiting(older_than=0.0, limit=10, queue="a", before=moment)
    long_log.unsent(limit=10)
    long_log.purge(older_than=3600.0 * 24 * 365 * 20, limit=10)

    for plan, index in zip(plans, ("open", "open", "processed", "processed"), strict=True):
        assert uses(plan, index, dialect), f"{index}: {plan}"


def test_what_waits_on_any_queue_is_read_queue_by_queue(
    long_log: SQLStore, plans: list[str], statements: list[str]
) -> None:
    dialect = long_log.engine.dialect.name
    rows = long_log.waiting(older_than=0.0, limit=ROWS)

    assert len(rows) == ROWS // 10
    assert {row.queue for row in rows} == {"a", "b", "c"}
    # One for the rows without a queue; for each of three queues, two; and one that finds no fourth.
    assert len([text for text in statements if text.startswith("SELECT")]) == 8
    assert len(plans) == 8
    for plan in plans:
        # On MariaDB the least of an index is known before there is a plan; and the other index, which is not partial there, has what
        # waits in its order too, and serves as well for the queue that most of it waits on.
        served = (uses(plan, "open", dialect), uses(plan, "processed", dialect) and dialect == "mysql")
        assert any(served) or "optimized away" in plan, plan
    # And in one order.
    oldest = [row.key.message_id for row in long_log.waiting(older_than=0.0, limit=10)]
    assert oldest == [f"pending:{number:05}" for number in range(10)]


def test_what_ran_or_runs_is_listed_by_indexes(long_log: SQLStore, plans: list[str]) -> None:
    """What `recover` asks, which has not seen any delivery."""
    assert "running" in {row.key.message_id for row in long_log.newest(limit=10)}

    for plan, index in zip(plans, ("open", "processed"), strict=True):
        assert uses(plan, index, long_log.engine.dialect.name), plan


def test_listings_are_limited_by_the_database(long_log: SQLStore, statements: list[str]) -> None:
    assert len(list(long_log.rows(RowFilter(limit=7)))) == 7
    assert "LIMIT" in statements[-1]
