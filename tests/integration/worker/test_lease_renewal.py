"""A lease lives as long as its owner is known to live, and ends with it: real workers, with leases of a second or two."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from celery.result import AsyncResult

from celery_idempotent.core.records import ProcessedStatus, Status
from tests.support.apps import AppSpec, OpenApp
from tests.support.deployment import Deployment
from tests.support.servers import PrivatePostgreSQL
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import Pool, StartWorker, WorkerProcess

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE

#: Seconds. Long enough for a busy machine to renew in time, short enough to see many of them.
LEASE = 2.0

TASKS = ("tests.support.apps.generic", "tests.support.apps.lasting")

on_redis = pytest.mark.parametrize("broker", ["redis"], indirect=True)


@dataclass
class TwoWorkers(Deployment):
    """A worker that has a message, and another one that waits for it to die.

    The broker's patience is a second, so that what runs for longer is delivered to the other one, again and again.
    """

    start_worker: StartWorker

    def worker(self, *, waiting: bool = False, **options: Any) -> WorkerProcess:
        """Start a worker; one that waits consumes only once :meth:`let_wait` says so."""
        if waiting:
            options["queues"] = [f"{self.spec.queue}-aside"]
        return self.start_worker(self.spec, wait=False, **options)

    def let_wait(self, worker: WorkerProcess, queue: str, result: AsyncResult[Any]) -> None:
        """Have the other worker look for messages where the first one does, and wait until it was given this one."""
        worker.wait_until_ready()
        self.app.control.add_consumer(queue, destination=[worker.hostname])
        worker.wait_for_log(f"{result.id}] received")

    def wait_for_renewals(self, task: str, result: AsyncResult[Any], *, since: datetime, seconds: float) -> None:
        """Wait until the lease has been renewed, without a break, for so long."""

        def renewed() -> bool:
            row = self.row(task, result)
            assert row.status is Status.PROCESSING
            assert row.token == 1, f"taken over: {row}"
            assert row.lease_expires_at is not None
            return (row.lease_expires_at - since).total_seconds() > seconds + LEASE

        wait_until(renewed, describe=lambda: f"renewals: {self.row(task, result)}")

    def break_connections(self, worker: WorkerProcess) -> None:
        """Cut everybody off from Redis, and wait until the worker is connected again."""

        def connected() -> int:
            return worker.log.read_bytes().count(b"Connected to ")

        before = connected()
        with redis.Redis.from_url(self.spec.broker) as broker:
            broker.client_kill_filter(_type="normal", skipme=True)
        worker.wait_for_log("Connection to broker lost")
        wait_until(lambda: connected() > before, describe=worker.log_tail)


@pytest.fixture
def deploy(spec: AppSpec, open_app: OpenApp, start_worker: StartWorker) -> Callable[..., TwoWorkers]:
    def deploy(**settings: Any) -> TwoWorkers:
        deployed_spec = replace(
            spec,
            tasks=TASKS,
            transport_options={**spec.transport_options, "visibility_timeout": 1},
            settings={
                **spec.settings,
                "idempotent_lease": LEASE,
                "idempotent_recovery_interval": 1.0,
                **settings,
            },
        )
        app = open_app(deployed_spec)
        app.finalize()
        return TwoWorkers(deployed_spec, app, start_worker)

    return deploy


@on_redis
class TestWhileTheOwnerLives:
    def test_a_body_that_holds_the_gil_runs_once(self, deploy: Callable[..., TwoWorkers]) -> None:
        """No thread of the child can renew: its parent does."""
        deployment = deploy()
        worker, other = deployment.worker(), deployment.worker(waiting=True)
        worker.wait_until_ready()
        other.wait_until_ready()

        result = deployment.send("last.gil", 3 * LEASE)
        deployment.wait_for_starts("last.gil", result)
        deployment.let_wait(other, deployment.spec.queue, result)

        assert result.get(timeout=TIMEOUT) == "awake"
        (start,) = deployment.starts("last.gil", result)
        (end,) = deployment.ledger.ends("last.gil", task_id=result.id)
        assert start.worker == worker.hostname
        assert end.at - start.at >= 3 * LEASE
        row = deployment.row("last.gil", result)
        assert (row.processed_status, row.token, row.takeovers) == (SUCCESS, 1, 0)

    def test_a_body_longer_than_its_lease_runs_once_on_every_pool(self, deploy: Callable[..., TwoWorkers]) -> None:
        """One worker of each kind, on a queue of its own, and another one that waits on all of these."""
        deployment = deploy()
        pools: tuple[Pool, ...] = ("prefork", "threads", "solo", "gevent")
        queues = {pool: f"{deployment.spec.queue}-{pool}" for pool in pools}
        workers = {pool: deployment.worker(pool=pool, queues=[queues[pool]]) for pool in pools}
        other = deployment.worker(waiting=True, concurrency=4)
        for worker in workers.values():
            worker.wait_until_ready()
        gate = deployment.gate()

        task = deployment.app.tasks["last.late"]
        results = {pool: task.apply_async((str(gate), pool), queue=queues[pool]) for pool in pools}
        for result in results.values():
            deployment.wait_for_starts("last.late", result)
        began = deployment.row("last.late", result).read_at
        for pool in pools:
            deployment.let_wait(other, queues[pool], results[pool])
        for result in results.values():
            deployment.wait_for_renewals("last.late", result, since=began, seconds=3 * LEASE)
        gate.touch()

        for pool, result in results.items():
            assert result.get(timeout=TIMEOUT) == pool
            (start,) = deployment.starts("last.late", result)
            assert start.worker == workers[pool].hostname
            assert deployment.row("last.late", result).token == 1

    @pytest.mark.parametrize(
        ("signum", "said", "settings"),
        [
            (signal.SIGTERM, "Warm shutdown", {}),
            # It lasts that long, whatever ends before.
            (signal.SIGQUIT, "Initiating Soft Shutdown", {"worker_soft_shutdown_timeout": 10 * LEASE}),
        ],
        ids=["warm", "soft"],
    )
    def test_a_shutdown_longer_than_the_lease_is_waited_for(
        self, deploy: Callable[..., TwoWorkers], signum: signal.Signals, said: str, settings: dict[str, Any]
    ) -> None:
        deployment = deploy(**settings)
        worker, other = deployment.worker(), deployment.worker(waiting=True)
        worker.wait_until_ready()
        gate = deployment.gate()

        result = deployment.send("last.late", str(gate), "drained")
        deployment.wait_for_starts("last.late", result)
        worker.signal(signum)
        worker.wait_for_log(said)
        stopping = deployment.row("last.late", result).read_at
        deployment.let_wait(other, deployment.spec.queue, result)
        deployment.wait_for_renewals("last.late", result, since=stopping, seconds=3 * LEASE)
        gate.touch()

        assert result.get(timeout=TIMEOUT) == "drained"
        wait_until(lambda: not worker.is_alive, describe=worker.log_tail)
        assert worker.exit_status == 0
        assert len(deployment.starts("last.late", result)) == 1

    @pytest.mark.parametrize("pool", ["prefork", "threads"])
    def test_short_tasks_cost_no_renewal(self, deploy: Callable[..., TwoWorkers], store_url: str, pool: Pool) -> None:
        deployment = deploy(idempotent_lease=6.0)
        count = count_renewals(store_url)
        worker = deployment.worker(pool=pool)
        worker.wait_until_ready()

        first = deployment.send("add", 0, 0)
        for number in range(20):
            assert deployment.send("add", number, number).get(timeout=TIMEOUT) == 2 * number
        assert count(first.id) == 0
        gate = deployment.gate()
        long = deployment.send("gated", str(gate))
        wait_until(lambda: count(long.id), describe="a renewal of the long one")
        gate.touch()
        long.get(timeout=TIMEOUT)

        # All the time that the long one took, the short ones were due for a renewal, had they still been held.
        renewed = count(None)
        assert renewed == count(long.id) > 0


@on_redis
class TestWhenTheOwnerEnds:
    def test_a_killed_child_is_replaced_at_once(self, deploy: Callable[..., TwoWorkers]) -> None:
        """Its lease of ten minutes ends with it."""
        deployment = deploy()
        worker = deployment.worker()
        worker.wait_until_ready()
        gate = deployment.gate()

        result = deployment.send("last.late.long", str(gate), "again")
        deployment.wait_for_starts("last.late.long", result)
        worker.kill_children()
        deployment.wait_for_starts("last.late.long", result, 2)
        gate.touch()

        assert result.get(timeout=TIMEOUT) == "again"
        row = deployment.row("last.late.long", result)
        assert (row.processed_status, row.token) == (SUCCESS, 2)
        assert len(deployment.starts("last.late.long", result)) == 2

    @pytest.mark.parametrize(
        "signals", [(signal.SIGQUIT,), (signal.SIGINT, signal.SIGINT)], ids=["SIGQUIT", "SIGINT twice"]
    )
    def test_a_cold_shutdown_gives_up_its_leases(
        self, deploy: Callable[..., TwoWorkers], signals: tuple[signal.Signals, ...]
    ) -> None:
        deployment = deploy()
        worker, other = deployment.worker(), deployment.worker(waiting=True)
        worker.wait_until_ready()
        gate = deployment.gate()

        result = deployment.send("last.late.long", str(gate), "by the other")
        deployment.wait_for_starts("last.late.long", result)
        deployment.let_wait(other, deployment.spec.queue, result)
        for number, signum in enumerate(signals):
            if number:
                worker.wait_for_log("initiate cold shutdown")
            worker.signal(signum)
        starts = deployment.wait_for_starts("last.late.long", result, 2)
        gate.touch()

        assert result.get(timeout=TIMEOUT) == "by the other"
        assert [start.worker for start in starts] == [worker.hostname, other.hostname]
        wait_until(lambda: not worker.is_alive, describe=worker.log_tail)
        assert deployment.row("last.late.long", result).token == 2

    def test_a_cold_shutdown_ends_what_was_acknowledged_early(self, deploy: Callable[..., TwoWorkers]) -> None:
        deployment = deploy()
        worker, other = deployment.worker(), deployment.worker(waiting=True)
        worker.wait_until_ready()

        result = deployment.send("last.early.long", str(deployment.gate()))
        deployment.wait_for_starts("last.early.long", result)
        worker.signal(signal.SIGQUIT)
        other.wait_until_ready()
        deployment.app.control.add_consumer(deployment.spec.queue, destination=[other.hostname])

        # The other worker's recovery finds its lease ended, ten minutes before its time.
        row = deployment.wait_until_done("last.early.long", result)
        assert row.processed_status is ProcessedStatus.FAILURE
        assert str(row.error).startswith("abandoned")
        assert len(deployment.starts("last.early.long", result)) == 1

    @pytest.mark.parametrize("pool", ["prefork", "gevent"])
    def test_a_body_cancelled_after_a_broken_connection_runs_again_at_once(
        self, deploy: Callable[..., TwoWorkers], pool: Pool
    ) -> None:
        deployment = deploy(worker_cancel_long_running_tasks_on_connection_loss=True)
        worker = deployment.worker(pool=pool)
        worker.wait_until_ready()
        gate = deployment.gate()

        result = deployment.send("last.late.long", str(gate), "again")
        deployment.wait_for_starts("last.late.long", result)
        deployment.break_connections(worker)
        deployment.wait_for_starts("last.late.long", result, 2)
        gate.touch()

        wait_until(lambda: deployment.app.AsyncResult(result.id).successful(), describe=worker.log_tail)
        assert deployment.row("last.late.long", result).token == 2

    def test_a_child_killed_after_a_reconnect_ends_its_claim(self, deploy: Callable[..., TwoWorkers]) -> None:
        """Celery 5.5's pool forgets what it runs when the connection breaks, and never tells the end of it."""
        deployment = deploy()
        worker = deployment.worker()
        worker.wait_until_ready()

        result = deployment.send("last.early", str(deployment.gate()))
        deployment.wait_for_starts("last.early", result)
        deployment.break_connections(worker)
        worker.kill_children()

        row = deployment.wait_until_done("last.early", result)
        assert row.processed_status is FAILURE
        assert str(row.error).startswith("abandoned")
        assert len(deployment.starts("last.early", result)) == 1

    def test_a_body_terminated_after_a_reconnect_ends_at_once(self, deploy: Callable[..., TwoWorkers]) -> None:
        deployment = deploy()
        worker = deployment.worker()
        worker.wait_until_ready()

        result = deployment.send("last.early.long", str(deployment.gate()))
        deployment.wait_for_starts("last.early.long", result)
        deployment.break_connections(worker)
        # It hears commands a little later than messages.
        wait_until(lambda: deployment.app.control.ping([worker.hostname]), timeout=TIMEOUT, describe=worker.log_tail)
        deployment.app.control.revoke(result.id, terminate=True)

        assert deployment.wait_until_done("last.early.long", result).processed_status is FAILURE
        assert len(deployment.starts("last.early.long", result)) == 1

    @pytest.mark.parametrize("all_of_it", [True, False], ids=["all of it", "its main process"])
    def test_a_message_whose_worker_was_killed_runs_again_after_its_lease(
        self, deploy: Callable[..., TwoWorkers], all_of_it: bool
    ) -> None:
        """Celery has the kernel kill a child whose parent died, so that there are no orphans."""
        deployment = deploy()
        worker, other = deployment.worker(), deployment.worker(waiting=True)
        worker.wait_until_ready()
        gate = deployment.gate()

        result = deployment.send("last.late", str(gate), "by the other")
        deployment.wait_for_starts("last.late", result)
        (child,) = worker.children()
        if all_of_it:
            worker.kill()
        else:
            os.kill(worker.pid, signal.SIGKILL)
        wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
        left = deployment.row("last.late", result)
        assert left.lease_expires_at is not None
        assert 0 < left.lease_left <= LEASE
        deployment.let_wait(other, deployment.spec.queue, result)
        starts = deployment.wait_for_starts("last.late", result, 2)
        gate.touch()

        assert result.get(timeout=TIMEOUT) == "by the other"
        # The clock of SQLite is this machine's; a millisecond is what it tells.
        assert starts[1].at >= left.lease_expires_at.timestamp() - 0.001
        assert len(deployment.starts("last.late", result)) == 2


@on_redis
def test_a_database_that_is_away_for_less_than_a_lease_costs_nothing(
    deploy: Callable[..., TwoWorkers], private_postgresql: PrivatePostgreSQL, spec: AppSpec
) -> None:
    lease = 12.0
    deployment = deploy(idempotent_lease=lease)
    worker = deployment.worker()
    worker.wait_until_ready()
    gate = deployment.gate()

    result = deployment.send("last.late", str(gate), "after the blink")
    deployment.wait_for_starts("last.late", result)
    private_postgresql.stop()
    # A renewal is due after a third of the lease, and is asked for in vain.
    worker.wait_for_log("could not renew")
    private_postgresql.start()
    back = deployment.row("last.late", result)
    assert back.lease_left > 0, "the machine is too slow to tell"
    deployment.wait_for_renewals("last.late", result, since=back.read_at, seconds=lease)
    gate.touch()

    assert result.get(timeout=TIMEOUT) == "after the blink"
    assert len(deployment.starts("last.late", result)) == 1


@pytest.fixture
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """SQLite, or the PostgreSQL that the test has to itself."""
    if "private_postgresql" in request.fixturenames:
        private: PrivatePostgreSQL = request.getfixturevalue("private_postgresql")
        return private.url
    return f"sqlite:///{tmp_path / 'store.db'}"


def count_renewals(store_url: str) -> Callable[[str | None], int]:
    """Have the database count what prolongs a lease; of one message, or of all."""
    path = store_url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            """
            CREATE TABLE renewals (message_id TEXT);
            CREATE TRIGGER renewed AFTER UPDATE OF lease_expires_at ON queue_log
            WHEN new.token = old.token AND new.lease_expires_at > old.lease_expires_at
            BEGIN INSERT INTO renewals VALUES (new.message_id); END;
            """
        )

    def count(message_id: str | None) -> int:
        with closing(sqlite3.connect(path)) as connection:
            query = "SELECT count(*) FROM renewals WHERE ? IS NULL OR message_id = ?"
            return int(connection.execute(query, (message_id, message_id)).fetchone()[0])

    return count
