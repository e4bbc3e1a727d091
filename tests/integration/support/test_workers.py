"""The workers that all other tests rely on, on Celery's own task class: started, killed and replaced."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.support.apps import AppSpec, OpenApp
from tests.support.ledger import Ledger
from tests.support.waiting import wait_until
from tests.support.worker import Pool, StartWorker

pytestmark = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
on_redis = pytest.mark.parametrize("broker", ["redis"], indirect=True)


@pytest.fixture
def plain(spec: AppSpec) -> AppSpec:
    return replace(spec, base="plain")


def test_a_worker_of_each_broker_runs_a_task_and_shuts_down(
    plain: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger
) -> None:
    app = open_app(plain)
    worker = start_worker(plain, pool="threads")

    result = app.tasks["add"].apply_async((2, 3), message_id="m-1")

    assert result.get(timeout=30) == 5
    (start,) = ledger.starts("add")
    (end,) = ledger.ends("add")
    assert (start.task_id, start.retries, start.pid, start.worker) == (result.id, 0, worker.pid, worker.hostname)
    assert start.at <= end.at
    assert worker.terminate() == 0


def test_a_countdown_is_kept_by_each_broker(
    plain: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger
) -> None:
    app = open_app(plain)
    start_worker(plain, pool="threads")

    result = app.tasks["retry_n"].delay(2, countdown=1)

    assert result.get(timeout=30) == 2
    first, second, third = ledger.starts("retry_n", task_id=result.id)
    assert [first.retries, second.retries, third.retries] == [0, 1, 2]
    assert third.at - first.at >= 1.0
    assert [note.detail for note in ledger.entries("raise")] == ["Retry", "Retry"]


@on_redis
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_a_worker_of_each_pool_runs_a_task_and_shuts_down(
    plain: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger, pool: Pool
) -> None:
    app = open_app(plain)
    worker = start_worker(plain, pool=pool, concurrency=2)

    assert app.tasks["echo"].delay("there").get(timeout=30) == "there"

    (start,) = ledger.starts()
    assert (start.pid == worker.pid) == (pool != "prefork")
    assert worker.terminate() == 0


@on_redis
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_a_killed_worker_leaves_nothing_and_its_task_is_delivered_again(
    plain: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger, tmp_path: Path, pool: Pool
) -> None:
    plain = replace(
        plain,
        settings={"task_acks_late": True},
        transport_options={**plain.transport_options, "visibility_timeout": 2},
    )
    app = open_app(plain)
    first = start_worker(plain, pool=pool)
    gate = tmp_path / "gate"
    result = app.tasks["gated"].delay(str(gate), "through")
    wait_until(lambda: ledger.starts("gated"), describe="the first start")
    processes = [psutil.Process(first.pid), *first.children()]
    assert len(processes) == (2 if pool == "prefork" else 1)

    first.kill()

    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    gate.touch()
    # Not gevent again: without Celery's event loop kombu (5.7) never looks for expired deliveries on Redis, as the empty
    # answer to its BRPOP, once a second, ends each look at the sockets before that.
    start_worker(plain, pool="threads")
    assert result.get(timeout=30) == "through"
    assert len(ledger.starts("gated", task_id=result.id)) == 2
    assert len(ledger.ends("gated")) == 1


@on_redis
def test_a_killed_child_is_found_out_by_its_parent(
    plain: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger, tmp_path: Path
) -> None:
    app = open_app(plain)
    worker = start_worker(plain, pool="prefork")
    result = app.tasks["gated"].delay(str(tmp_path / "gate"))
    (start,) = wait_until(ledger.starts, describe="the start")

    assert start.pid in worker.kill_children()

    error = result.get(timeout=30, propagate=False)
    assert type(error).__name__ == "WorkerLostError"
    assert app.tasks["echo"].delay(1).get(timeout=30) == 1
    assert worker.is_alive


@on_redis
def test_a_paused_worker_does_nothing_until_it_is_resumed(
    plain: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger
) -> None:
    app = open_app(plain)
    worker = start_worker(plain, pool="prefork")
    worker.pause()
    processes = (psutil.Process(worker.pid), *worker.children())
    wait_until(lambda: {each.status() for each in processes} == {psutil.STATUS_STOPPED}, describe="the pause")
    result = app.tasks["echo"].delay(1)

    worker.resume()

    assert result.get(timeout=30) == 1
    assert worker.is_alive


@on_redis
def test_a_worker_that_cannot_start_is_reported_with_its_log(plain: AppSpec, start_worker: StartWorker) -> None:
    with pytest.raises(AssertionError, match=r"ended with status 2:(?s:.*)No such option.*--no-such-thing"):
        start_worker(plain, pool="solo", arguments=["--no-such-thing"])


@on_redis
def test_a_warm_shutdown_lets_the_running_task_finish(
    plain: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger, tmp_path: Path
) -> None:
    app = open_app(plain)
    worker = start_worker(plain, pool="prefork")
    gate = tmp_path / "gate"
    app.tasks["gated"].delay(str(gate))
    wait_until(ledger.starts, describe="the start")

    worker.signal(signal.SIGTERM)
    worker.wait_for_log("Warm shutdown")
    gate.touch()

    wait_until(lambda: not worker.is_alive, describe="the end of the worker")
    assert worker.exit_status == 0
    assert len(ledger.ends("gated")) == 1


@on_redis
def test_nothing_outlives_a_worker_whose_main_process_was_killed_alone(
    plain: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger, tmp_path: Path
) -> None:
    app = open_app(plain)
    worker = start_worker(plain, pool="prefork")
    app.tasks["gated"].delay(str(tmp_path / "gate"))
    (start,) = wait_until(ledger.starts, describe="the start")
    child = psutil.Process(start.pid)

    worker.signal(signal.SIGKILL)
    wait_until(lambda: not worker.is_alive, describe="the end of the main process")
    worker.stop()

    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
