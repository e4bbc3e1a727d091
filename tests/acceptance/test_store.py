"""What a task costs the queue log's database and Redis, and what happens while the database is down."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import sqlalchemy as sa
from redis import Redis

from celery_idempotent import StoreUnavailableError
from celery_idempotent.queue_log import QueueLog
from tests.conftest import attach_log
from tests.support.apps import AppSpec, close_app
from tests.support.deployment import unique
from tests.support.servers import PrivatePostgreSQL, PrivateRedis, skip_if_not_installed
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import wait_until
from tests.support.worker import WorkerProcess

#: Tasks that are counted.
TASKS = 20

#: What kombu asks of Redis all the time, to wait for messages and to look for those whose time is up.
POLLING = {"brpop", "multi", "exec", "watch", "unwatch", "set", "del", "zrevrangebyscore", "eval", "evalsha", "ping"}


@pytest.fixture(scope="module")
def database() -> Iterator[PrivatePostgreSQL]:
    """Yield a PostgreSQL that logs every statement."""
    with skip_if_not_installed("a private PostgreSQL"), PrivatePostgreSQL() as server:
        engine = sa.create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.execute(sa.text("ALTER SYSTEM SET log_statement = 'all'"))
            connection.execute(sa.text("SELECT pg_reload_conf()"))
        yield server


@pytest.fixture(scope="module")
def shared(
    database: PrivatePostgreSQL, shared_redis: PrivateRedis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedWorker]:
    directory = tmp_path_factory.mktemp("store")
    spec = AppSpec(
        broker=f"{shared_redis.url.removesuffix('/0')}/3",
        backend=shared_redis.url,
        store=database.url,
        queue=unique("queue"),
        ledger=str(directory / "ledger.jsonl"),
        tasks=("tests.support.apps.scenarios",),
        # What a worker asks the database besides, it asks by the minute and not by the task.
        settings={"task_acks_late": True, "idempotent_recovery_interval": 0},
    )
    with ExitStack() as stack:
        app = spec.build()
        stack.callback(close_app, app)
        QueueLog.of(app).init()
        worker = WorkerProcess(directory, spec.environment())
        stack.callback(worker.stop)
        yield SharedWorker(spec, app, worker.start())


@pytest.fixture
def shared_worker(shared: SharedWorker, request: pytest.FixtureRequest) -> SharedWorker:
    attach_log(request, f"worker {shared.worker.hostname}", shared.worker.log_tail)
    return shared


@pytest.mark.xdist_group("store")
def test_every_task_costs_the_database_three_statements(
    shared_worker: SharedWorker, database: PrivatePostgreSQL
) -> None:
    order = shared_worker.task("order")
    assert order.delay(unique()).get(timeout=60)
    shared_worker.wait_until_idle()
    before = len(database.log.read_bytes())

    results = [order.delay(unique()) for _ in range(TASKS)]
    assert all(result.get(timeout=60) for result in results)

    def statements() -> list[str]:
        text = database.log.read_bytes()[before:].decode()
        return re.findall(r"LOG:  (?:statement|execute [^:]*): *(\w+)", text)

    wait_until(lambda: len(statements()) >= 3 * TASKS, timeout=60, describe=lambda: Counter(statements()))
    assert len(statements()) == 3 * TASKS, Counter(statements())


@pytest.mark.parametrize("both_workers", ["redis"], indirect=True)
def test_every_task_costs_redis_what_it_costs_plain_celery(
    guarded: SharedWorker, plain: SharedWorker, shared_redis: PrivateRedis
) -> None:
    with Redis.from_url(shared_redis.url) as redis:
        costs = []
        for shared_worker in (guarded, plain):
            once = shared_worker.task("once")
            shared_worker.wait_until_idle()
            redis.config_resetstat()
            results = [once.delay(unique()) for _ in range(TASKS)]
            assert all(result.get(timeout=60) for result in results)
            stats = redis.info("commandstats")
            costs.append({name.removeprefix("cmdstat_"): stats[name]["calls"] for name in stats})

    guarded_cost, plain_cost = costs
    assert guarded_cost["lpush"] == plain_cost["lpush"] == TASKS
    # One operation more per task would be twenty; what a worker asks by the second is left out.
    more = {name: guarded_cost[name] - plain_cost.get(name, 0) for name in guarded_cost.keys() - POLLING}
    assert all(count < TASKS for count in more.values()), costs


@pytest.mark.xdist_group("store")
def test_the_store_is_down(shared_worker: SharedWorker, database: PrivatePostgreSQL) -> None:
    sent_before, refused = unique(), unique()
    order = shared_worker.task("order")
    result, message = shared_worker.copies(lambda queue: order.apply_async((sent_before,), queue=queue))

    database.stop()
    with pytest.raises(StoreUnavailableError):
        order.delay(refused)
    shared_worker.put(message)
    shared_worker.worker.wait_for_log(f"Task order[{result.id}] received")
    # The worker asks and gets no answer; it neither runs the task nor drops it.
    shared_worker.worker.wait_for_log("Connection refused", timeout=60)
    assert shared_worker.starts_under(sent_before) == []
    database.start()

    assert result.get(timeout=90).startswith(sent_before)
    shared_worker.wait_until_idle()
    assert (len(shared_worker.starts_under(sent_before)), len(shared_worker.starts_under(refused))) == (1, 0)
    assert shared_worker.wait_until_done("order", f"order:{sent_before}").processed_status == "success"
    again = order.delay(refused)
    assert not again.duplicate
    assert again.get(timeout=60).startswith(refused)
