"""A pool's process is killed inside the body: its claim ends at once, and Celery's options say what follows."""

from __future__ import annotations

import pytest
from billiard.exceptions import WorkerLostError

from celery_idempotent.core.records import ProcessedStatus, Status
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.versions import CELERY
from tests.support.waiting import TIMEOUT, wait_until

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE


def test_an_early_acknowledged_message_fails(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("die.early").apply_async((shared_worker.path("flag"),), message_id=m)

    row = shared_worker.wait_until_done("die.early", m)
    assert (row.processed_status, row.token, row.lease_expires_at) == (FAILURE, 1, None)
    assert str(row.error).startswith("abandoned")
    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), WorkerLostError)
    assert len(shared_worker.starts("die.early", m)) == 1


def test_a_lost_processs_result_is_stored_for_it(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("die.unstored").apply_async(message_id=m)

    assert result.get(timeout=TIMEOUT) == {"value": "stored by another"}
    row = shared_worker.row("die.unstored", m)
    assert (row.status, row.processed_status, row.token) == (Status.DONE, SUCCESS, 1)
    assert len(shared_worker.starts("die.unstored", m)) == 1


def test_a_rejected_message_runs_again_at_once(shared_worker: SharedWorker) -> None:
    """``acks_late`` with ``reject_on_worker_lost``: its lease of an hour is not waited for."""
    m = unique()

    result = shared_worker.task("die.late.rejected").apply_async((shared_worker.path("flag"),), message_id=m)

    assert result.get(timeout=TIMEOUT) == "survived"
    starts = shared_worker.starts("die.late.rejected", m)
    assert [(start.task_id, start.retries) for start in starts] == [(result.id, 0)] * 2
    row = shared_worker.row("die.late.rejected", m)
    assert (row.status, row.processed_status, row.token, row.attempt) == (Status.DONE, SUCCESS, 2, 0)


def test_a_rejected_message_that_must_not_run_twice_fails(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("die.late.rejected.fail").apply_async((shared_worker.path("flag"),), message_id=m)

    row = shared_worker.wait_until_done("die.late.rejected.fail", m)
    assert (row.processed_status, row.token) == (FAILURE, 1)
    assert str(row.error).startswith("abandoned")
    assert type(result.get(timeout=TIMEOUT, propagate=False)).__name__ == "AlreadyFailedError"
    assert len(shared_worker.starts("die.late.rejected.fail", m)) == 1


@pytest.mark.skipif(CELERY < (5, 7), reason="Celery has retry_on_worker_lost since 5.7")
@pytest.mark.parametrize("task", ["die.retried", "die.late.retried"])
def test_a_message_that_is_retried_runs_again_as_its_next_attempt(shared_worker: SharedWorker, task: str) -> None:
    m = unique()

    result = shared_worker.task(task).apply_async((shared_worker.path("flag"),), message_id=m)

    assert result.get(timeout=TIMEOUT) == "survived"
    starts = shared_worker.starts(task, m)
    assert [(start.task_id, start.retries) for start in starts] == [(result.id, 0), (result.id, 1)]
    row = shared_worker.wait_until_done(task, m)
    assert (row.processed_status, row.token, row.attempt, row.duplicates) == (SUCCESS, 2, 1, 0)


def test_an_unacknowledged_message_is_open_to_a_takeover(shared_worker: SharedWorker) -> None:
    """``acks_late`` alone: Celery stores a failure and acknowledges, so that only the row still knows of the message."""
    m, flag = unique(), shared_worker.path("flag")

    result = shared_worker.task("die.late").apply_async((flag,), message_id=m)

    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), WorkerLostError)
    row = shared_worker.wait_for_row("die.late", m, lambda row: row.status is Status.DONE or row.lease_left <= 0)
    assert (row.status, row.token) == (Status.PROCESSING, 1)
    # A copy takes it over, now and not in an hour.
    shared_worker.deliver("die.late", (flag,), message_id=m, task_id=result.id)
    row = shared_worker.wait_until_done("die.late", m)
    assert (row.processed_status, row.token) == (SUCCESS, 2)
    assert len(shared_worker.starts("die.late", m)) == 2

    # Celery stores the result after the row is done. Until then the failure stands there.
    def stored() -> bool:
        return shared_worker.task("die.late").AsyncResult(result.id).result == "survived"  # type: ignore[no-any-return]

    wait_until(stored, describe="the result of the second run")
