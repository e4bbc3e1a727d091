"""The same few promises with every pool, broker and store: a compact cover of their product, not all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, chain

from celery_idempotent.core.records import MessageKey, ProcessedStatus, Row, Status
from tests.conftest import StartWorker
from tests.support.apps import AppSpec
from tests.support.ledger import Ledger
from tests.support.shared_workers import TIMEOUT, close
from tests.support.waiting import wait_until
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


@dataclass
class Deployment:
    """An app and its worker, seen from a test."""

    app: Celery
    #: A producer that does not have this library; sends copies.
    foreign: Celery
    ledger: Ledger
    directory: Path

    def row(self, task: str, message_id: str, condition: Callable[[Row], bool] = lambda row: True) -> Row:
        def as_wanted() -> Row | None:
            row: Row | None = self.app.queue_log.store.find(MessageKey(message_id, task))
            return row if row is not None and condition(row) else None

        return wait_until(as_wanted, timeout=TIMEOUT, describe=f"the row of {task}[{message_id}]")

    def starts(self, task: str, message_id: str) -> list[int]:
        """Return the retries of each run."""
        return [note.retries for note in self.ledger.starts(task) if note.message_id == message_id]

    def copy(self, task: str, args: tuple[Any, ...], message_id: str, task_id: str) -> None:
        """Put a message on the broker once more: as a broker delivers it again, with the same ids."""
        self.foreign.tasks[task].apply_async(args, message_id=message_id, task_id=task_id)


def runs_once_and_answers_every_caller(deployment: Deployment) -> None:
    m = f"once-{uuid4().hex}"

    results = [deployment.app.tasks["echo"].apply_async(("value",), message_id=m) for _ in range(3)]

    assert [result.duplicate for result in results] == [False, True, True]
    assert [result.get(timeout=TIMEOUT) for result in results] == ["value"] * 3
    row = deployment.row("echo", m, lambda row: row.status is Status.DONE)
    assert (row.processed_status, row.token, row.duplicates) == (SUCCESS, 1, 2)
    assert deployment.starts("echo", m) == [0]


def retries_under_one_row(deployment: Deployment) -> None:
    m = f"retry-{uuid4().hex}"

    result = deployment.app.tasks["retry_n"].apply_async((2, 1), message_id=m)

    assert result.get(timeout=TIMEOUT) == 2
    row = deployment.row("retry_n", m, lambda row: row.status is Status.DONE)
    assert (row.processed_status, row.attempt, row.token) == (SUCCESS, 2, 3)
    assert deployment.starts("retry_n", m) == [0, 1, 2]


def records_a_failure(deployment: Deployment) -> None:
    m = f"failure-{uuid4().hex}"

    result = deployment.app.tasks["fail"].apply_async(message_id=m)

    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), ValueError)
    row = deployment.row("fail", m, lambda row: row.status is Status.DONE)
    assert (row.processed_status, row.error) == (ProcessedStatus.FAILURE, "ValueError: as told")


def skips_a_redelivered_copy(deployment: Deployment) -> None:
    m = f"copy-{uuid4().hex}"
    result = deployment.app.tasks["echo"].apply_async(("value",), message_id=m)
    assert result.get(timeout=TIMEOUT) == "value"

    deployment.copy("echo", ("value",), m, result.id)

    row = deployment.row("echo", m, lambda row: row.duplicates == 1)
    assert (row.status, row.token) == (Status.DONE, 1)
    assert deployment.starts("echo", m) == [0]


def holds_a_copy_while_it_runs(deployment: Deployment) -> None:
    m, gate = f"held-{uuid4().hex}", deployment.directory / uuid4().hex
    result = deployment.app.tasks["busy.hold"].apply_async((str(gate), "value"), message_id=m)
    wait_until(lambda: deployment.starts("busy.hold", m), timeout=TIMEOUT, describe="the start")

    deployment.copy("busy.hold", (str(gate), "value"), m, result.id)
    gate.touch()

    assert result.get(timeout=TIMEOUT) == "value"
    row = deployment.row("busy.hold", m, lambda row: row.duplicates == 1)
    assert (row.status, row.processed_status, row.token) == (Status.DONE, SUCCESS, 1)
    assert deployment.starts("busy.hold", m) == [0]


def replays_a_duplicate_in_a_chain(deployment: Deployment) -> None:
    m, add = f"chain-{uuid4().hex}", deployment.app.tasks["add"]

    first = chain(add.s(1, 1).set(message_id=m), add.s(1), app=deployment.app).apply_async()
    assert first.get(timeout=TIMEOUT) == 3
    second = chain(add.s(1, 1).set(message_id=m), add.s(1), app=deployment.app).apply_async()

    assert second.get(timeout=TIMEOUT) == 3
    assert deployment.starts("add", m) == [0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("pool", "broker", "store_url"), COVER, indirect=["broker", "store_url"])
def test_the_promises_hold(
    spec: AppSpec, start_worker: StartWorker, ledger: Ledger, tmp_path: Path, pool: Pool
) -> None:
    spec = replace(spec, tasks=(*spec.tasks, "tests.support.apps.outcomes"))
    app, foreign = spec.build(), replace(spec, base="plain").build()
    app.finalize()
    app.queue_log.init()
    worker = start_worker(spec, pool=pool, concurrency=2)
    deployment = Deployment(app, foreign, ledger, tmp_path)
    try:
        runs_once_and_answers_every_caller(deployment)
        retries_under_one_row(deployment)
        records_a_failure(deployment)
        skips_a_redelivered_copy(deployment)
        holds_a_copy_while_it_runs(deployment)
        replays_a_duplicate_in_a_chain(deployment)
    finally:
        close(app)
        close(foreign)
    assert worker.terminate() == 0
