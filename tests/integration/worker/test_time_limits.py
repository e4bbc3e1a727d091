"""Time limits: the soft one is an error of the body, the hard one ends the pool's process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from celery import states
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from celery_idempotent.core.records import MessageKey, ProcessedStatus, Status
from tests.conftest import StartWorker
from tests.support.apps import AppSpec, OpenApp
from tests.support.deployment import unique
from tests.support.effects import Effects
from tests.support.ledger import Ledger
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import WorkerProcess

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE


def test_the_soft_limit_is_a_failure(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("soft").apply_async((shared_worker.path("flag"),), message_id=m)

    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), SoftTimeLimitExceeded)
    row = shared_worker.row("soft", m)
    assert (row.status, row.processed_status, row.token) == (Status.DONE, FAILURE, 1)
    assert "SoftTimeLimitExceeded" in str(row.error)
    assert len(shared_worker.starts("soft", m)) == 1


def test_a_body_that_heeds_the_soft_limit_succeeds(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("soft.tidy").apply_async(message_id=m)

    assert result.get(timeout=TIMEOUT) == "cut short"
    assert shared_worker.row("soft.tidy", m).processed_status is SUCCESS


@pytest.mark.parametrize("task", ["hard.early", "hard.early.unacknowledged", "hard.late"])
def test_the_hard_limit_is_a_failure(shared_worker: SharedWorker, task: str) -> None:
    m, flag = unique(), shared_worker.path("flag")

    result = shared_worker.task(task).apply_async((flag,), message_id=m)

    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), TimeLimitExceeded)
    row = shared_worker.wait_until_done(task, m)
    assert (row.processed_status, row.token, row.lease_expires_at) == (FAILURE, 1, None)
    assert "TimeLimitExceeded" in str(row.error)
    # It is not left for a copy to be run again.
    copy = shared_worker.deliver(task, (flag,), message_id=m, task_id=result.id)
    shared_worker.wait_for_row(task, m, lambda row: row.duplicates == 1)
    assert isinstance(copy.get(timeout=TIMEOUT, propagate=False), TimeLimitExceeded)
    assert len(shared_worker.starts(task, m)) == 1


def test_the_hard_limit_gives_an_unacknowledged_message_back(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("hard.late.unacknowledged").apply_async((shared_worker.path("flag"),), message_id=m)

    starts = shared_worker.wait_for_starts("hard.late.unacknowledged", m, 2)
    assert [start.retries for start in starts] == [0, 0]
    assert starts[0].task_id == starts[1].task_id == result.id
    row = shared_worker.wait_until_done("hard.late.unacknowledged", m)
    assert (row.processed_status, row.token, row.attempt) == (SUCCESS, 2, 0)
    # Celery has stored a failure at the limit, in the place of which the second run stores its result.
    wait_until(
        lambda: shared_worker.app.AsyncResult(result.id).state == states.SUCCESS,
        describe="the result of the second run",
    )
    assert shared_worker.app.AsyncResult(result.id).result == "in time"
    assert len(shared_worker.starts("hard.late.unacknowledged", m)) == 2


@contextmanager
def locked_until_the_limit_strikes(store_url: str, worker: WorkerProcess) -> Iterator[None]:
    """Lock the table; in the end, wait until the soft limit strikes, while what the worker asks of the table waits."""
    engine = sa.create_engine(store_url)
    try:
        with engine.begin() as connection:
            connection.execute(sa.text("LOCK TABLE queue_log IN ACCESS EXCLUSIVE MODE"))
            yield
            worker.wait_for_log("Soft time limit (3")
    finally:
        engine.dispose()


@pytest.mark.parametrize("acks_late", [False, True])
@pytest.mark.parametrize("broker", ["redis"], indirect=True)
@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_the_soft_limit_spares_a_message_waiting_for_its_claim(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, store_url: str, ledger: Ledger, acks_late: bool
) -> None:
    spec = replace(spec, settings={**spec.settings, "task_acks_late": acks_late})
    app = open_app(spec)
    result = app.tasks["echo"].apply_async(("value",), message_id="m", soft_time_limit=3)

    worker = start_worker(spec, wait=False)
    with locked_until_the_limit_strikes(store_url, worker):
        pass

    assert result.get(timeout=TIMEOUT) == "value"
    assert "still claimed" not in worker.log.read_text(), "what was given back is not lost"
    assert len(ledger.starts("echo")) == 1
    row = app.queue_log.store.find(MessageKey("m", "echo"))
    assert (row.status, row.processed_status, row.attempt) == (Status.DONE, SUCCESS, 0)


@pytest.mark.parametrize("task", ["gated", "atomic.gated"])
@pytest.mark.parametrize("broker", ["redis"], indirect=True)
@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_the_soft_limit_does_not_strike_a_body_that_has_ended(
    spec: AppSpec,
    open_app: OpenApp,
    start_worker: StartWorker,
    store_url: str,
    ledger: Ledger,
    tmp_path: Path,
    task: str,
) -> None:
    spec = replace(spec, tasks=("tests.support.apps.generic", "tests.support.apps.atomic"))
    app, gate = open_app(spec), tmp_path / "gate"
    effects = Effects(store_url)
    worker = start_worker(spec)
    args = (str(gate),) if task == "gated" else ("effect", str(gate))
    result = app.tasks[task].apply_async(args, message_id="m", soft_time_limit=3)
    wait_until(lambda: ledger.starts(task), describe="the start")

    with locked_until_the_limit_strikes(store_url, worker):
        gate.touch()
        wait_until(lambda: ledger.ends(task_id=result.id), describe="the end of the body")

    result.get(timeout=TIMEOUT)
    row = app.queue_log.store.find(MessageKey("m", task))
    assert (row.status, row.processed_status, row.token) == (Status.DONE, SUCCESS, 1)
    assert effects.names() == ([] if task == "gated" else ["effect"])
