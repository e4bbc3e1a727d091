"""The databases use an index for each statement, whatever the size of the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import sqlalchemy as sa

from celery_idempotent.core.records import RowFilter
from celery_idempotent.stores.sql import SQLStore
from celery_idempotent.stores.sql.dialects import Dialect
from tests.integration.stores.sql import long_log, plans, verbs
from tests.support.servers import KINDS
from tests.support.stores import STORES, mariadb_store, postgresql_store, sqlite_store

#: Each of these logs is made once: its tests stay together.
_KINDS = [pytest.param(kind, marks=pytest.mark.xdist_group(f"a long log on {kind}")) for kind in STORES]


@pytest.fixture(scope="module", params=_KINDS)
def long(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SQLStore]:
    """Yield a log of some hundred thousand rows; what a test leaves in it is forgotten."""
    with ExitStack() as stack:
        match request.param:
            case "sqlite":
                url = sqlite_store(tmp_path_factory.mktemp("long"))
            case "postgresql":
                url = stack.enter_context(postgresql_store(KINDS["postgresql"].require()))
            case _:
                url = stack.enter_context(mariadb_store(KINDS["mariadb"].require()))
        store = stack.enter_context(closing(SQLStore(url)))
        store.init()
        long_log.fill(store)
        yield store


def carried_out(store: SQLStore, verb: verbs.Verb) -> Iterator[tuple[plans.Plans, list[plans.Plan]]]:
    """Yield the plans of a verb's statements, for each way in which the database plans."""
    for watched in plans.watch(store.engine):
        try:
            prepared = verb.prepare(SQLStore(watched.engine))
            watched.seen.clear()
            prepared()
            yield watched, list(watched.seen)
        finally:
            watched.engine.dispose()
            long_log.forget(store, verbs.USED)


@pytest.mark.parametrize("verb", verbs.EVERYTHING, ids=str)
def test_a_verb_reads_no_more_than_it_needs(long: SQLStore, verb: verbs.Verb) -> None:
    dialect = long.engine.dialect.name
    for watched, seen in carried_out(long, verb):
        # Of how a row is inserted there is something to tell on PostgreSQL only.
        assert seen or (dialect != "postgresql" and str(verb).startswith("record"))
        # What a question that is answered by many rows may read, and no verb else.
        much = long_log.DONE if verb.reads_all else long_log.PENDING if dialect in verb.reads_backlog else 0
        for plan in seen:
            assert plan.scans <= verb.reads_all, (plan.effort, plan.text)
            assert plan.sorts <= (verb.sorts or verb.reads_all), plan
            assert plan.indexes <= (verb.indexes | verb.on_mysql if dialect == "mysql" else verb.indexes), plan
            assert plan.effort <= max(watched.little, much * 3), plan


def test_no_statement_of_the_store_is_left_out(long: SQLStore) -> None:
    """Each that its parts have been given is carried out by one of the verbs above, or is the beginning of one that is."""
    carried: list[Any] = []

    def note(connection: sa.Connection, element: Any, *_: object) -> None:
        carried.append(element)

    sa.event.listen(sa.Engine, "before_execute", note)
    try:
        for verb in verbs.EVERYTHING:
            prepared = verb.prepare(long)
            prepared()
            long_log.forget(long, verbs.USED)
    finally:
        sa.event.remove(sa.Engine, "before_execute", note)

    parts = ("_read", "_recording", "_claims", "_transitions", "_reading", "_recovering", "_admin")
    held = {f"{part}.{name}": each for part in parts for name, each in statements_of(getattr(long, part))}
    assert len(held) > 30, sorted(held)
    # That deletes every row, in tests: no plan to choose.
    del held["_admin.erase"]
    assert {name for name, each in held.items() if not any(begins(each, element) for element in carried)} == set()


def statements_of(part: object) -> Iterator[tuple[str, Any]]:
    """Yield the statements that an object holds, and those of the statements' holders that it holds."""
    names = list(vars(part)) if hasattr(part, "__dict__") else list(getattr(part, "__slots__", ()))
    for name in names:
        value = getattr(part, name)
        if isinstance(value, sa.Select | sa.sql.dml.UpdateBase):
            yield name, value
        elif type(value).__module__.startswith("celery_idempotent.stores.sql") and not isinstance(value, Dialect):
            for inner, each in statements_of(value):
                yield f"{name}.{inner}", each


def begins(statement: Any, carried: Any) -> bool:
    """Return whether what was carried out is the statement, or was made of it by more conditions or a limit."""
    if statement is carried:
        return True
    if type(statement) is not type(carried) or isinstance(statement, sa.Insert):
        return False
    conditions = statement._where_criteria
    same = all(one is other for one, other in zip(conditions, carried._where_criteria, strict=False))
    if not same or len(conditions) > len(carried._where_criteria):
        return False
    if isinstance(statement, sa.Select):
        return (
            statement._raw_columns is carried._raw_columns and statement._order_by_clauses == carried._order_by_clauses
        )
    return bool(conditions)


def test_waiting_messages_are_read_queue_by_queue(long: SQLStore, statements: list[str]) -> None:
    rows = long.waiting(older_than=0.0, limit=2 * long_log.PENDING)

    assert len(rows) == long_log.PENDING
    assert {row.queue for row in rows} == set(long_log.QUEUES)
    # One for the rows without a queue; for each of three queues, two; and one that finds no fourth.
    assert len([text for text in statements if text.startswith("SELECT") and "queue_log" in text]) == 8
    # And in one order.
    oldest = [row.published_at for row in long.waiting(older_than=0.0, limit=10)]
    assert oldest == sorted(row.published_at for row in rows if row.published_at is not None)[:10]


def test_listings_are_limited_by_the_database(long: SQLStore, statements: list[str]) -> None:
    assert len(list(long.rows(RowFilter(limit=7)))) == 7
    assert "LIMIT" in [text for text in statements if text.startswith("SELECT")][-1]
