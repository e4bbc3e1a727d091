"""Real workers whose queue log is in Redis: on a server of its own, which is not the broker's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import chain, group
from redis import Redis

from celery_idempotent import ConfigurationError, IdempotentTask, outbox
from celery_idempotent.core.records import ProcessedStatus, Status
from celery_idempotent.maintenance.rescue import Rescue
from tests.support.apps import AppSpec, OpenApp
from tests.support.brokers import Broker
from tests.support.deployment import Deployment
from tests.support.servers import PrivateRedis, skip_if_not_installed
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import ROOT, StartWorker

TASKS = ("tests.support.apps.generic", "tests.support.apps.lasting", "tests.support.apps.scenarios")

pytestmark = pytest.mark.parametrize("broker", ["redis"], indirect=True)


@pytest.fixture
def store_server() -> Iterator[PrivateRedis]:
    """Yield the queue log's own Redis."""
    with skip_if_not_installed(), PrivateRedis() as server:
        yield server


@pytest.fixture
def store_url(store_server: PrivateRedis) -> str:
    return store_server.url


@pytest.fixture
def deploy(spec: AppSpec, open_app: OpenApp) -> Callable[..., Deployment]:
    def deploy(**settings: Any) -> Deployment:
        given = {**spec.settings, "idempotent_lease": 2.0, "idempotent_recovery_interval": 1.0, **settings}
        deployed_spec = replace(spec, tasks=TASKS, settings=given)
        return Deployment(deployed_spec, open_app(deployed_spec))

    return deploy


def test_a_duplicate_call_is_skipped_and_a_duplicate_delivery_too(
    deploy: Callable[..., Deployment], start_worker: StartWorker, broker: Broker
) -> None:
    deployment = deploy()
    order = deployment.app.tasks["order"]
    first = order.delay("o-1")
    with Redis.from_url(broker.url) as client:
        (message,) = client.lrange(broker.queue, 0, -1)
        client.lpush(broker.queue, message)
    again = order.delay("o-1")
    assert (again.id, again.duplicate) == (first.id, True)

    start_worker(deployment.spec)
    assert first.get(timeout=TIMEOUT).startswith("o-1 by ")
    row = deployment.wait_for_row("order", "order:o-1", lambda row: row.duplicates == 2)
    assert (row.status, row.processed_status, row.token) == (Status.DONE, ProcessedStatus.SUCCESS, 1)
    assert len(deployment.ledger.starts("order")) == 1


def test_a_worker_that_is_killed_in_the_midst_is_taken_over_from(
    deploy: Callable[..., Deployment], start_worker: StartWorker
) -> None:
    task = "last.late"
    deployment = deploy()
    worker = start_worker(deployment.spec)
    gate = deployment.gate()
    result = deployment.send(task, str(gate), "back")
    wait_until(lambda: deployment.ledger.starts(task, task_id=result.id))
    worker.kill()
    start_worker(deployment.spec)
    wait_until(lambda: len(deployment.ledger.starts(task, task_id=result.id)) == 2)
    gate.touch()

    assert result.get(timeout=TIMEOUT) == "back"
    row = deployment.wait_until_done(task, result.id)
    assert (row.processed_status, row.token, row.takeovers) == (ProcessedStatus.SUCCESS, 2, 1)
    assert len(deployment.ledger.ends(task, task_id=result.id)) == 1


def test_a_lease_is_renewed_for_as_long_as_the_body_runs(
    deploy: Callable[..., Deployment], start_worker: StartWorker
) -> None:
    deployment = deploy()
    start_worker(deployment.spec)
    result = deployment.send("slow", 5.0, "slept")
    claimed = deployment.wait_for_row("slow", result.id, lambda row: row.status is Status.PROCESSING)
    assert claimed.lease_expires_at is not None
    until = claimed.lease_expires_at
    deployment.wait_for_row(
        "slow", result.id, lambda row: row.lease_expires_at is not None and row.lease_expires_at > until
    )
    assert result.get(timeout=TIMEOUT) == "slept"
    assert deployment.wait_until_done("slow", result.id).token == 1


def test_a_task_is_retried_and_fails_and_goes_on_in_a_chain(
    deploy: Callable[..., Deployment], start_worker: StartWorker
) -> None:
    deployment = deploy()
    start_worker(deployment.spec, concurrency=2)
    retried, failed = deployment.send("retry_n", 2), deployment.send("fail", "as told")
    add = deployment.app.tasks["add"]
    chained = chain(add.s(1, 2), add.s(3), add.s(4), app=deployment.app).delay()

    assert retried.get(timeout=TIMEOUT) == 2
    assert chained.get(timeout=TIMEOUT) == 10
    assert isinstance(failed.get(timeout=TIMEOUT, propagate=False), ValueError)
    row = deployment.wait_until_done("retry_n", retried.id)
    assert (row.attempt, row.token) == (2, 3)
    row = deployment.wait_until_done("fail", failed.id)
    assert (row.processed_status, row.error) == (ProcessedStatus.FAILURE, "ValueError: as told")
    assert row.message is not None
    assert len(deployment.ledger.starts("add")) == 3


def test_a_message_lost_by_the_broker_comes_back(
    deploy: Callable[..., Deployment], start_worker: StartWorker, broker: Broker
) -> None:
    deployment = deploy(idempotent_lost_after=1.0)
    lost = [deployment.send("echo", number) for number in range(20)]
    with Redis.from_url(broker.url) as client:
        client.flushall()
    start_worker(deployment.spec)
    rows = [deployment.row("echo", result.id) for result in lost]
    latest = max(row.created_timestamp for row in rows)
    wait_until(lambda: (deployment.row("echo", lost[0]).read_at - latest).total_seconds() > 1.5)
    # Recorded more than a second after them, and claimed.
    assert deployment.send("echo", "later").get(timeout=TIMEOUT) == "later"
    assert [result.get(timeout=TIMEOUT) for result in lost] == list(range(20))
    assert len(deployment.ledger.starts("echo")) == 21


def test_recover_says_so_at_once(deploy: Callable[..., Deployment], start_worker: StartWorker, broker: Broker) -> None:
    deployment = deploy(idempotent_recovery_interval=0)
    lost = [deployment.send("echo", number) for number in range(500)]
    with Redis.from_url(broker.url) as client:
        client.flushall()
    assert Rescue.of(deployment.app.queue_log).publish_waiting(0.0) == 500
    with Redis.from_url(broker.url) as client:
        assert client.llen(broker.queue) == 500
    start_worker(deployment.spec, concurrency=2)
    assert [result.get(timeout=TIMEOUT) for result in lost] == list(range(500))


def test_the_log_may_be_away_for_a_while(
    deploy: Callable[..., Deployment], start_worker: StartWorker, store_server: PrivateRedis
) -> None:
    deployment = deploy()
    start_worker(deployment.spec)
    gate = deployment.gate()
    result = deployment.send("gated", str(gate), "kept")
    wait_until(lambda: deployment.ledger.starts("gated"))
    waiting = deployment.send("echo", "waits")
    store_server.kill()
    gate.touch()
    wait_until(lambda: deployment.ledger.ends("gated"))
    store_server.start()

    assert result.get(timeout=TIMEOUT) == "kept"
    assert waiting.get(timeout=TIMEOUT) == "waits"
    assert deployment.wait_until_done("gated", result.id).token == 1
    assert len(deployment.ledger.starts("gated")) == 1


def test_a_batch_is_recorded_and_published(
    deploy: Callable[..., Deployment], start_worker: StartWorker, broker: Broker
) -> None:
    deployment = deploy()
    echo, order = deployment.app.tasks["echo"], deployment.app.tasks["order"]
    first = order.delay("o-1")
    with outbox():
        results = [echo.delay(number) for number in range(700)]
        again = order.delay("o-1")
    with Redis.from_url(broker.url) as client:
        assert client.llen(broker.queue) == 701
    assert (again.id, again.duplicate) == (first.id, True)
    assert not any(result.duplicate for result in results)
    assert deployment.app.queue_log.store.unsent(limit=10) == []
    start_worker(deployment.spec, concurrency=2)
    assert [result.get(timeout=TIMEOUT) for result in results] == list(range(700))
    assert len(deployment.ledger.starts("echo")) == 700


def test_a_call_that_needs_a_transaction_says_there_is_none(deploy: Callable[..., Deployment], tmp_path: Path) -> None:
    deployment = deploy()
    text = "needs a store with transactions, such as SQLStore; RedisStore has none"

    @deployment.app.task(base=IdempotentTask, name="atomic", atomic=True, shared=False)
    def atomic() -> None:
        """Fail, because this must not be called."""

    for call in (atomic.delay, atomic.s().delay, (group(atomic.s()) | atomic.s()).delay):
        with pytest.raises(ConfigurationError, match=f"atomic=True {text}"):
            call()
    assert not any(count.task_name == "atomic" for count in deployment.app.queue_log.store.counts())

    @deployment.app.task(base=IdempotentTask, name="turned off", atomic=True, idempotent=False, shared=False)
    def turned_off() -> None:
        """Run in some other worker, whose store has transactions."""

    assert not turned_off.delay().duplicate  # plain Celery's, as a call by name is

    deployment.app.conf.task_always_eager = True
    with pytest.raises(ConfigurationError, match=f"atomic=True {text}"):
        atomic.apply(throw=True)
    deployment.app.conf.task_always_eager = False

    engine = sa.create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    with (
        closing(engine.connect()) as connection,
        connection.begin(),
        outbox(connection),
        pytest.raises(ConfigurationError, match=rf"outbox\(session\) {text}"),
    ):
        deployment.app.tasks["echo"].delay(1)
    engine.dispose()


def test_the_command_line_works_as_with_any_store(
    deploy: Callable[..., Deployment], start_worker: StartWorker, store_server: PrivateRedis
) -> None:
    deployment = deploy()
    order = deployment.app.tasks["order"]
    results = [order.delay(f"o-{number}") for number in range(3)]
    order.delay("o-1")
    start_worker(deployment.spec)
    for result in results:
        result.get(timeout=TIMEOUT)
    failed = deployment.send("fail", "no")
    failed.get(timeout=TIMEOUT, propagate=False)
    deployment.wait_until_done("fail", failed.id)

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "celery", "-A", "tests.support.apps.worker", "idempotent", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **deployment.spec.environment()}
        done = subprocess.run(
            command, cwd=deployment.ledger.path.parent, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "order:o-2" in run("show", "order:o-2")
    listed = json.loads(run("list", "--task", "order", "--json"))
    assert [row["message_id"] for row in listed] == ["order:o-2", "order:o-1", "order:o-0"]
    stats = json.loads(run("stats", "--json"))
    assert {(count["task_name"], count["rows"], count["duplicates"]) for count in stats} == {
        ("order", 3, 1),
        ("fail", 1, 0),
    }
    run("init")
    run("recover")
    # A failure can be requeued, and is kept for longer.
    assert "purged 3" in run("purge", "--older-than", "0s", "--yes")
    assert "purged 1" in run("purge", "--older-than", "0s", "--processed-status", "failure", "--yes")
    with Redis.from_url(store_server.url) as client:
        assert [key.partition(b"}:")[2] for key in client.scan_iter()] == [b"layout"]
