"""The same few promises with every pool, broker and store: a compact cover of their product, not all of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from celery import chain

from celery_idempotent.core.records import ProcessedStatus, Status
from tests.conftest import StartWorker
from tests.support.apps import AppSpec, OpenApp
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import Pool

SUCCESS = ProcessedStatus.SUCCESS

#: Each pool, each broker and each store at least twice, and each driver under each kind of concurrency.
COVER = [
    ("threads", "redis", "postgresql"),
    ("gevent", "redis", "postgresql"),
    ("solo", "redis", "mariadb"),
    ("prefork", "rabbitmq-classic", "postgresql"),
    ("gevent", "rabbitmq-classic", "mariadb"),
    ("prefork", "rabbitmq-quorum", "mariadb"),
    ("threads", "rabbitmq-quorum", "sqlite"),
    ("prefork", "filesystem", "sqlite"),
    ("solo", "filesystem", "sqlite"),
]


def retries_of(worker: SharedWorker, task: str, message_id: str) -> list[int]:
    """Return Celery's retry count of each run."""
    return [note.retries for note in worker.starts(task, message_id)]


def runs_once_and_answers_every_caller(worker: SharedWorker) -> None:
    m = unique("once")

    results = [worker.task("echo").apply_async(("value",), message_id=m) for _ in range(3)]

    assert [result.duplicate for result in results] == [False, True, True]
    assert [result.get(timeout=TIMEOUT) for result in results] == ["value"] * 3
    row = worker.wait_until_done("echo", m)
    assert (row.processed_status, row.token, row.duplicates) == (SUCCESS, 1, 2)
    assert retries_of(worker, "echo", m) == [0]


def retries_under_one_row(worker: SharedWorker) -> None:
    m = unique("retry")

    result = worker.task("retry_n").apply_async((2, 1), message_id=m)

    assert result.get(timeout=TIMEOUT) == 2
    row = worker.wait_until_done("retry_n", m)
    assert (row.processed_status, row.attempt, row.token) == (SUCCESS, 2, 3)
    assert retries_of(worker, "retry_n", m) == [0, 1, 2]


def records_a_failure(worker: SharedWorker) -> None:
    m = unique("failure")

    result = worker.task("fail").apply_async(message_id=m)

    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), ValueError)
    row = worker.wait_until_done("fail", m)
    assert (row.processed_status, row.error) == (ProcessedStatus.FAILURE, "ValueError: as told")


def skips_a_redelivered_copy(worker: SharedWorker) -> None:
    m = unique("copy")
    result = worker.task("echo").apply_async(("value",), message_id=m)
    assert result.get(timeout=TIMEOUT) == "value"

    worker.deliver("echo", ("value",), message_id=m, task_id=result.id)

    row = worker.wait_for_row("echo", m, lambda row: row.duplicates == 1)
    assert (row.status, row.token) == (Status.DONE, 1)
    assert retries_of(worker, "echo", m) == [0]


def holds_a_copy_while_it_runs(worker: SharedWorker) -> None:
    m, gate = unique("held"), worker.gate()
    result = worker.task("busy.hold").apply_async((str(gate), "value"), message_id=m)
    wait_until(lambda: retries_of(worker, "busy.hold", m), describe="the start")

    worker.deliver("busy.hold", (str(gate), "value"), message_id=m, task_id=result.id)
    gate.touch()

    assert result.get(timeout=TIMEOUT) == "value"
    row = worker.wait_for_row("busy.hold", m, lambda row: row.duplicates == 1)
    assert (row.status, row.processed_status, row.token) == (Status.DONE, SUCCESS, 1)
    assert retries_of(worker, "busy.hold", m) == [0]


def replays_a_duplicate_in_a_chain(worker: SharedWorker) -> None:
    m, add = unique("chain"), worker.task("add")

    first = chain(add.s(1, 1).set(message_id=m), add.s(1), app=worker.app).apply_async()
    assert first.get(timeout=TIMEOUT) == 3
    second = chain(add.s(1, 1).set(message_id=m), add.s(1), app=worker.app).apply_async()

    assert second.get(timeout=TIMEOUT) == 3
    assert retries_of(worker, "add", m) == [0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("pool", "broker", "store_url"), COVER, indirect=["broker", "store_url"])
def test_each_pool_broker_and_store_keeps_the_promises(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, pool: Pool
) -> None:
    spec = replace(spec, tasks=(*spec.tasks, "tests.support.apps.outcomes"))
    worker = SharedWorker(spec, open_app(spec), start_worker(spec, pool=pool, concurrency=2))
    try:
        runs_once_and_answers_every_caller(worker)
        retries_under_one_row(worker)
        records_a_failure(worker)
        skips_a_redelivered_copy(worker)
        holds_a_copy_while_it_runs(worker)
        replays_a_duplicate_in_a_chain(worker)
    finally:
        worker.close()
    assert worker.worker.terminate() == 0
