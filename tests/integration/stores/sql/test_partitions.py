"""A queue log whose table is partitioned by hash, as on the page "Past one server": the store works on it as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa

from celery_idempotent.core.store import Store
from celery_idempotent.stores import open_store
from celery_idempotent.stores.sql import SQLStore
from celery_idempotent.testing import StoreContract, TransactionContract
from tests.integration.stores.sql import long_log, plans, verbs
from tests.support.servers import KINDS
from tests.support.stores import postgresql_store

PAGE = Path(__file__).parents[4] / "docs" / "how-to" / "scale.md"

#: Parts of the log whose plans are looked at.
PARTS = 4

pytestmark = pytest.mark.xdist_group("partitions")


def migration(parts: int) -> list[str]:
    """Return the statements of the page, which turn ``queue_log`` into a partitioned table; with fewer parts than there."""
    found = re.search(r"```sql\n(-- partitions\n.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    statements = [statement.replace("MODULUS 16", f"MODULUS {parts}") for statement in found[1].split(";")]
    part = re.compile(r"REMAINDER (\d+)")
    return [each for each in statements if each.strip() and not ((of := part.search(each)) and int(of[1]) >= parts)]


@contextmanager
def partitioned(parts: int = 16) -> Iterator[str]:
    """Yield the URL of a schema in which the table is partitioned."""
    with postgresql_store(KINDS["postgresql"].require()) as url:
        with closing(SQLStore(url)) as store:
            store.init()
            earlier = verbs.processing(store)
            with store.engine.begin() as connection:
                for statement in migration(parts):
                    connection.execute(sa.text(statement))
            # What runs goes on.
            assert store.complete(earlier, result=b"1")
            long_log.forget(store, verbs.USED)
        yield url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with partitioned() as url:
        yield url


class TestPartitioned(StoreContract, TransactionContract):
    @pytest.fixture
    def open_store_again(self, url: str) -> Iterator[Callable[[], Store]]:
        table = f"contract_{uuid4().hex[:12]}"
        engine = sa.create_engine(url)
        made = f"CREATE TABLE {table} (LIKE queue_log INCLUDING ALL) PARTITION BY HASH (message_id)"
        with engine.begin() as connection:
            connection.execute(sa.text(made))
            for number in range(4):
                part = f"FOR VALUES WITH (MODULUS 4, REMAINDER {number})"
                connection.execute(sa.text(f"CREATE TABLE {table}_{number} PARTITION OF {table} {part}"))
        yield partial(open_store, url, table=table)
        with engine.begin() as connection:
            connection.execute(sa.text(f"DROP TABLE {table}"))
        engine.dispose()


def test_the_pages_table_passes_the_check(url: str) -> None:
    with closing(SQLStore(url)) as store:
        store.check()
        assert not store.init()
        with store.engine.connect() as connection:
            kind = "SELECT relkind, (SELECT count(*) FROM pg_inherits WHERE inhparent = oid) FROM pg_class WHERE oid = 'queue_log'::regclass"
            assert tuple(connection.exec_driver_sql(kind).one()) == ("p", 16)


def test_an_index_that_is_missing_is_built_part_by_part() -> None:
    """As `init` of a version does that has a new one; what was built before it was broken off is not built again."""
    with partitioned(PARTS) as url, closing(SQLStore(url)) as store:
        found = sa.inspect(store.engine).get_indexes("queue_log")
        (name,) = [index["name"] for index in found if index["column_names"] == ["status", "queue", "published_at"]]
        with store.engine.begin() as connection:
            connection.execute(sa.text(f"DROP INDEX {name}"))
            connection.execute(
                sa.text(
                    "CREATE INDEX made ON queue_log_1 (status, queue, published_at) WHERE processed_timestamp IS NULL"
                )
            )
        assert [change.what for change in store.outstanding()] == [
            "create the index queue_log_0_open",
            "create the index queue_log_2_open",
            "create the index queue_log_3_open",
            "create the index queue_log_open",
        ]

        assert store.init()

        assert store.outstanding() == []
        parts = (
            "SELECT count(*) FROM pg_inherits JOIN pg_index ON indexrelid = inhparent "
            "WHERE inhparent = 'queue_log_open'::regclass AND indisvalid"
        )
        made = "SELECT inhparent = 'queue_log_open'::regclass FROM pg_inherits WHERE inhrelid = 'made'::regclass"
        with store.engine.connect() as connection:
            assert connection.scalar(sa.text(parts)) == PARTS
            assert connection.scalar(sa.text(made)), "it was taken for its part"


@pytest.fixture(scope="module")
def long() -> Iterator[SQLStore]:
    """Yield a log of some hundred thousand rows in partitions, which are long themselves."""
    with partitioned(PARTS) as url, closing(SQLStore(url)) as store:
        long_log.fill(store)
        yield store


@pytest.mark.parametrize("verb", [verb for verb in verbs.EVERYTHING if not verb.reads_all], ids=str)
def test_a_verb_reads_no_more_than_it_needs(long: SQLStore, verb: verbs.Verb) -> None:
    for watched in plans.watch(long.engine):
        try:
            prepared = verb.prepare(SQLStore(watched.engine))
            watched.seen.clear()
            prepared()
            assert watched.seen
            for plan in watched.seen:
                assert not plan.scans, plan
                assert plan.indexes <= verb.indexes, plan
                much = 3 * long_log.PENDING if "postgresql" in verb.reads_backlog else 0
                assert plan.effort <= max(PARTS * watched.little, much), plan
        finally:
            watched.engine.dispose()
            long_log.forget(long, verbs.USED)


def test_a_message_is_looked_for_in_its_partition_alone(long: SQLStore) -> None:
    for watched in plans.watch(long.engine):
        held = verbs.processing(SQLStore(watched.engine))
        watched.seen.clear()
        store = SQLStore(watched.engine)
        store.renew([held], lease=600.0)
        assert store.complete(held, result=b"1")
        assert store.find(held.key) is not None
        watched.engine.dispose()
        long_log.forget(long, verbs.USED)

        assert len(watched.seen) == 3
        for plan in watched.seen:
            # Of a plan that is made once for all parameters the others are there, and removed or never begun.
            begun = re.findall(
                r'"Relation Name": "(queue_log_\d+)",\s+(?:"[^"]+": [^\n]+\s+)*?"Actual Loops": [1-9]', plan.text
            )
            assert len(set(begun)) == 1, plan.text
