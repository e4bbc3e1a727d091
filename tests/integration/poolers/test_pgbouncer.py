"""A PgBouncer in transaction pooling: what a client leaves on a connection, the next client meets."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa

from celery_idempotent import SQLStore, StoreUnavailableError, queue_log_table
from celery_idempotent.core.records import Inserted, MessageKey, ProcessedStatus, Row, RowFilter, Status
from celery_idempotent.stores.sql import connection
from celery_idempotent.testing.examples import claim, new_message
from tests.conftest import StartWorker
from tests.support.apps import AppSpec, OpenApp
from tests.support.apps.pooled import LEASE
from tests.support.brokers import redis_broker
from tests.support.effects import Effects
from tests.support.ledger import Ledger
from tests.support.servers import PrivatePgBouncer, PrivatePostgreSQL, PrivateRedis
from tests.support.waiting import wait_until

#: One in fifty takes twelve seconds, and eight run at once.
TASKS = 600


@pytest.fixture
def spec(private_pgbouncer: PrivatePgBouncer, private_redis: PrivateRedis, ledger: Ledger) -> AppSpec:
    broker = redis_broker(private_redis.url)
    return AppSpec(
        broker=broker.url,
        backend=broker.url,
        store=private_pgbouncer.url,
        queue=broker.queue,
        ledger=str(ledger.path),
        tasks=("tests.support.apps.pooled",),
        transport_options=broker.transport_options,
    )


@pytest.fixture
def effects(private_postgresql: PrivatePostgreSQL) -> Iterator[Effects]:
    effects = Effects(private_postgresql.url)
    yield effects
    effects.close()


@pytest.fixture
def direct_store(private_postgresql: PrivatePostgreSQL) -> Iterator[SQLStore]:
    """Yield the same log, without the pooler."""
    store = SQLStore(private_postgresql.url)
    yield store
    store.close()


@pytest.fixture
def pooled(private_pgbouncer: PrivatePgBouncer) -> Iterator[SQLStore]:
    """Yield a store that connects through the pooler, its table made through it."""
    store = SQLStore(private_pgbouncer.url)
    store.init()
    yield store
    store.close()


def left_behind(pooler: PrivatePgBouncer) -> set[tuple[object, ...]]:
    """Return what the next clients find on each of the pooler's connections: named statements, locks, settings."""
    look = sa.text(
        "SELECT (SELECT count(*) FROM pg_prepared_statements),"
        " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'),"
        " current_setting('statement_timeout'), current_setting('lock_timeout')"
    )
    engine = sa.create_engine(pooler.url, connect_args={"prepare_threshold": None})
    with ExitStack() as stack:
        # Each in a transaction, so that they have all of the connections.
        clients = [stack.enter_context(engine.connect()) for _ in range(4)]
        found = {tuple(client.execute(look).one()) for client in clients}
    engine.dispose()
    return found


CLEAN: set[tuple[object, ...]] = {(0, 0, "0", "0")}


def use(store: SQLStore) -> None:
    """Use the verbs of a task, often enough for any driver to name their statements, from as many threads as have to share connections."""

    def one(number: int) -> None:
        key = MessageKey(f"m-{number}", "t")
        assert store.record(new_message(key)) == Inserted()
        held = claim(store, new_message(key))
        assert store.renew([held], lease=LEASE) == []
        assert store.complete(held, result=b"1")

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(one, range(320)))
    assert {(row.status, row.token) for row in rows(store)} == {(Status.DONE, 1)}


def test_the_verbs_leave_nothing_behind(pooled: SQLStore, private_pgbouncer: PrivatePgBouncer) -> None:
    use(pooled)
    assert left_behind(private_pgbouncer) == CLEAN


def test_the_store_is_right_beside_an_engine_that_prepares(
    pooled: SQLStore, private_pgbouncer: PrivatePgBouncer
) -> None:
    engine = sa.create_engine(private_pgbouncer.url)
    owned = SQLStore(engine)
    use(owned)
    owned.close()
    engine.dispose()
    assert left_behind(private_pgbouncer) == CLEAN


def test_the_table_is_changed_through_a_pooler(
    private_postgresql: PrivatePostgreSQL, private_pgbouncer: PrivatePgBouncer
) -> None:
    stores = [SQLStore(private_pgbouncer.url) for _ in range(3)]
    old = queue_log_table(sa.MetaData())
    old.indexes.clear()
    engine = sa.create_engine(private_postgresql.url)
    old.create(engine)
    engine.dispose()

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda store: store.init(), stores))

    assert stores[0].outstanding() == []
    assert left_behind(private_pgbouncer) == CLEAN
    for store in stores:
        store.close()


def test_operators_statements_have_no_limit(
    pooled: SQLStore, private_postgresql: PrivatePostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ANSWER", 1.0)
    impatient = SQLStore(pooled.engine.url)
    impatient.check()
    engine = sa.create_engine(private_postgresql.url)
    with engine.connect() as other:
        other.execute(sa.text("LOCK TABLE queue_log"))
        releasing = threading.Timer(3.0, other.rollback)
        releasing.start()
        with pytest.raises(StoreUnavailableError, match="within 1 s"):
            impatient.find(MessageKey("m", "t"))
        assert rows(impatient) == []
        releasing.join()
    engine.dispose()
    impatient.close()


def rows(store: SQLStore) -> list[Row]:
    return list(store.rows(RowFilter(limit=2 * TASKS)))


@pytest.mark.timeout(400)
def test_hundreds_of_tasks_run_once_behind_a_pooler(
    spec: AppSpec,
    effects: Effects,
    direct_store: SQLStore,
    ledger: Ledger,
    open_app: OpenApp,
    start_worker: StartWorker,
) -> None:
    app = open_app(spec)
    for pool in ("threads", "prefork"):
        start_worker(spec, pool=pool, concurrency=4, wait=False)
    names = [f"{'atomic' if number % 2 else 'plain'}-{number}" for number in range(TASKS)]

    def call(name: str) -> None:
        # One in fifty outlives its lease twice over.
        lasts = 2 * LEASE if name.endswith(("00", "01")) else 0.0
        app.tasks[f"pooled.{name.partition('-')[0]}"].delay(name, lasts)

    with ThreadPoolExecutor(8) as callers:
        list(callers.map(call, names))
    wait_until(
        lambda: not any(row.status is not Status.DONE for row in rows(direct_store)),
        timeout=300,
        interval=1.0,
        describe=lambda: Counter((row.status, row.processed_status) for row in rows(direct_store)),
    )

    found = rows(direct_store)
    assert Counter(row.processed_status for row in found) == {ProcessedStatus.SUCCESS: TASKS}
    assert {(row.token, row.takeovers) for row in found} == {(1, 0)}
    assert len(ledger.starts()) == TASKS
    assert effects.names() == sorted(name for name in names if name.startswith("atomic"))
    logs = [worker.read_text() for worker in Path(spec.ledger).parent.glob("*.log")]
    assert not [line for log in logs for line in log.splitlines() if "ERROR" in line or "could not renew" in line]
