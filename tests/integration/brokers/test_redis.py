"""Redis goes away, forgets, and delivers again what waits for its time: each message runs once, and none is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import redis

from celery_idempotent.core.records import Status
from celery_idempotent.maintenance.rescue import Rescue
from tests.conftest import StartWorker
from tests.integration.brokers.conftest import (
    Deploy,
    times_logged,
    wait_until_logged,
    wait_until_redis_has_nothing_left,
)
from tests.support.brokers import redis_broker
from tests.support.servers import PrivateRedis
from tests.support.waiting import wait_until

#: Seconds after which Redis delivers again what is not acknowledged.
VISIBILITY = {"visibility_timeout": 2}


@pytest.fixture
def server(private_redis: PrivateRedis) -> Iterator[PrivateRedis]:
    """Yield the broker alone; results are on another Redis."""
    with PrivateRedis() as server:
        yield server


@pytest.mark.parametrize("go_down", ["stop", "kill"])
@pytest.mark.parametrize("ends", ["during the outage", "after it"])
def test_a_restart_under_a_running_task_while_others_wait(
    deploy: Deploy, start_worker: StartWorker, server: PrivateRedis, go_down: str, ends: str
) -> None:
    """It keeps its data. A body that ends while it is away cannot be acknowledged, and is delivered again."""
    broker = redis_broker(server.url)
    deployment = deploy(broker, transport_options=VISIBILITY)
    worker = start_worker(deployment.spec)
    gate = deployment.gate()
    running = deployment.send("gated", str(gate), "running")
    deployment.wait_for_starts("gated", running)
    waiting = [deployment.send("echo", number) for number in range(5)]

    getattr(server, go_down)()
    wait_until_logged([worker], "Trying again in")
    if ends == "during the outage":
        gate.touch()
        wait_until(lambda: deployment.ledger.ends("gated"), describe="the end of the body")
    server.start()
    late = deployment.send("echo", "late")
    if ends == "after it":
        # Delivered again during its own run: held, as often as needed.
        wait_until_logged([worker], f"Task gated[{running.id}] received", 2)
        gate.touch()

    deployment.assert_ran_once("gated", {running: "running"})
    values = {result: number for number, result in enumerate(waiting)}
    deployment.assert_ran_once("echo", {**values, late: "late"})
    wait_until_redis_has_nothing_left(server.url, broker.queue)
    assert len(deployment.ledger.starts()) == 7


def restart(server: PrivateRedis) -> None:
    server.stop()
    server.start()


def flush(server: PrivateRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()


@pytest.mark.parametrize(("forget", "found"), [(restart, "by being overtaken"), (flush, "on demand")])
def test_a_redis_that_forgets_everything(
    deploy: Deploy, start_worker: StartWorker, forget: Callable[[PrivateRedis], None], found: str
) -> None:
    with PrivateRedis(persistent=False) as server:
        broker = redis_broker(server.url)
        overtaken = found == "by being overtaken"
        deployment = deploy(broker, idempotent_lost_after=1.0 if overtaken else 3600.0)
        worker = start_worker(deployment.spec)
        gate = deployment.gate()
        running = deployment.send("gated", str(gate), "running")
        deployment.wait_for_starts("gated", running)
        waiting = [deployment.send("echo", number) for number in range(5)]
        due_later = deployment.send("echo", "due later", countdown=3)

        forget(server)
        with redis.Redis.from_url(server.url) as client:
            assert (client.llen(broker.queue), client.hlen("unacked")) == (0, 0)
        gate.touch()
        deployment.assert_ran_once("gated", {running: "running"})
        values = {**{result: number for number, result in enumerate(waiting)}, due_later: "due later"}
        assert {deployment.row("echo", result).status for result in values} == {Status.PENDING}

        def is_overdue() -> bool:
            row = deployment.row("echo", due_later)
            return row.available_at is not None and (row.read_at - row.available_at).total_seconds() > 1.5

        rescue = Rescue.of(deployment.app.queue_log)
        if not overtaken:
            assert rescue.publish_waiting(0.0) == len(waiting), "what is due later may still come by itself"
            deployment.assert_ran_once(
                "echo", {result: value for result, value in values.items() if result != due_later}
            )
        wait_until(is_overdue, describe="its time is past")
        if overtaken:
            values[deployment.send("echo", "later")] = "later"
        else:
            assert rescue.publish_waiting(0.0) == 1

        deployment.assert_ran_once("echo", values)
        wait_until_redis_has_nothing_left(server.url, broker.queue)
        assert len(deployment.ledger.starts()) == 1 + len(values)
        assert times_logged(worker, "is published again: it was pending") == (6 if overtaken else 0)


def test_an_eta_beyond_the_visibility_timeout(deploy: Deploy, start_worker: StartWorker, server: PrivateRedis) -> None:
    """A worker keeps a message until its time, unacknowledged: others are handed copies, and all come due at once."""
    broker = redis_broker(server.url)
    deployment = deploy(broker, transport_options=VISIBILITY, worker_prefetch_multiplier=4)
    workers = [start_worker(deployment.spec, wait=False) for _ in range(2)]
    for worker in workers:
        worker.wait_until_ready()

    sent_at = time.time()
    result = deployment.send("slow", 3, "on time", countdown=6)

    (start,) = deployment.wait_for_starts("slow", result)
    deployment.assert_ran_once("slow", {result: "on time"})
    wait_until_redis_has_nothing_left(server.url, broker.queue)
    assert len(deployment.starts("slow", result)) == 1
    assert sent_at + 6 <= start.at < sent_at + 16
    assert sum(times_logged(worker, f"Task slow[{result.id}] received") for worker in workers) >= 3
