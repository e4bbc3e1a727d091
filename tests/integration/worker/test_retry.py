"""Retries: as many runs as Celery makes, and one row that waits for the next of them."""

from __future__ import annotations

import pytest
from celery.exceptions import MaxRetriesExceededError, Reject

from celery_idempotent.core.records import ProcessedStatus, Status
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.versions import CELERY
from tests.support.waiting import TIMEOUT

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE


@pytest.mark.parametrize("countdown", [0, 0.5])
def test_two_retries_are_three_runs_and_one_row(shared_worker: SharedWorker, countdown: float) -> None:
    m = unique()

    result = shared_worker.task("retry_n").apply_async((2, countdown), message_id=m)

    assert result.get(timeout=TIMEOUT) == 2
    starts = shared_worker.starts("retry_n", m)
    assert [(start.task_id, start.retries) for start in starts] == [(result.id, 0), (result.id, 1), (result.id, 2)]
    assert starts[2].at - starts[0].at >= 2 * countdown
    row = shared_worker.row("retry_n", m)
    assert (row.status, row.processed_status, row.attempt, row.token) == (Status.DONE, SUCCESS, 2, 3)
    assert (row.task_id, row.duplicates, row.message, row.error) == (result.id, 0, None, None)
    assert row.processed_timestamp is not None


def test_a_retried_message_without_an_id_keeps_its_row(shared_worker: SharedWorker) -> None:
    result = shared_worker.task("retry_n").delay(1)

    assert result.get(timeout=TIMEOUT) == 1
    assert [start.message_id for start in shared_worker.ledger.starts(task_id=result.id)] == [result.id] * 2
    row = shared_worker.row("retry_n", result.id)
    assert (row.processed_status, row.attempt, row.token) == (SUCCESS, 1, 2)


def test_a_waiting_retry_is_pending_for_its_next_attempt(shared_worker: SharedWorker) -> None:
    m = unique()
    shared_worker.task("retry_n").apply_async((1, 600), message_id=m)

    row = shared_worker.wait_for_row("retry_n", m, lambda row: row.attempt == 1)

    assert (row.status, row.processed_status, row.token, row.message is None) == (Status.PENDING, None, 1, False)
    assert row.available_at is not None
    assert 600 <= (row.available_at - row.created_timestamp).total_seconds() < 700


def test_a_call_during_a_retry_is_a_duplicate(shared_worker: SharedWorker) -> None:
    m = unique()
    first = shared_worker.task("retry_n").apply_async((1, 600), message_id=m)
    shared_worker.wait_for_row("retry_n", m, lambda row: row.attempt == 1)

    second = shared_worker.task("retry_n").apply_async((1, 600), message_id=m)

    assert (second.id, second.duplicate) == (first.id, True)
    row = shared_worker.row("retry_n", m)
    assert (row.status, row.attempt, row.token, row.duplicates) == (Status.PENDING, 1, 1, 1)


def test_an_old_copy_of_a_retried_message_does_not_run(shared_worker: SharedWorker) -> None:
    """The delivery before a retry comes back, as after a visibility timeout: it has fewer retries than the row waits for."""
    m = unique()
    first = shared_worker.task("retry_n").apply_async((1, 600), message_id=m)
    shared_worker.wait_for_row("retry_n", m, lambda row: row.attempt == 1)

    shared_worker.deliver("retry_n", (1, 600), message_id=m, task_id=first.id)

    shared_worker.wait_until_held("retry_n", m)
    assert [start.retries for start in shared_worker.starts("retry_n", m)] == [0]
    row = shared_worker.row("retry_n", m)
    assert (row.status, row.attempt, row.token) == (Status.PENDING, 1, 1)


def test_autoretry_for_retries_under_the_same_row(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("autoretry").apply_async((2,), message_id=m)

    assert result.get(timeout=TIMEOUT) == 2
    assert [start.retries for start in shared_worker.starts("autoretry", m)] == [0, 1, 2]
    row = shared_worker.row("autoretry", m)
    assert (row.processed_status, row.attempt, row.token) == (SUCCESS, 2, 3)


@pytest.mark.parametrize(
    ("own", "error"), [(False, MaxRetriesExceededError), (True, ValueError)], ids=["by default", "its own error"]
)
def test_when_retries_are_used_up_the_row_fails(shared_worker: SharedWorker, own: bool, error: type[Exception]) -> None:
    m = unique()

    result = shared_worker.task("give_up").apply_async((own,), message_id=m)

    with pytest.raises(error):
        result.get(timeout=TIMEOUT)
    assert len(shared_worker.starts("give_up", m)) == 3
    row = shared_worker.row("give_up", m)
    assert (row.status, row.processed_status, row.attempt, row.token) == (Status.DONE, FAILURE, 2, 3)
    assert error.__name__ in str(row.error)
    assert row.message is not None, "a failed message is kept, so that it can be sent again"


def test_a_retry_that_is_not_thrown_decides_all_the_same(shared_worker: SharedWorker) -> None:
    """After ``retry(throw=False)`` the body goes on to its end, whose value is not the message's."""
    m = unique()

    result = shared_worker.task("retry_quietly").apply_async((2,), message_id=m)

    assert result.get(timeout=TIMEOUT) == "after 2"
    assert len(shared_worker.starts("retry_quietly", m)) == 3
    row = shared_worker.row("retry_quietly", m)
    assert (row.processed_status, row.attempt, row.token) == (SUCCESS, 2, 3)


def test_a_retry_with_other_arguments_is_the_same_message(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("retry_changed").apply_async((["a", "b", "c"],), message_id=m)

    assert result.get(timeout=TIMEOUT) == ["c"]
    assert len(shared_worker.starts("retry_changed", m)) == 3
    row = shared_worker.row("retry_changed", m)
    assert (row.processed_status, row.attempt, row.duplicates) == (SUCCESS, 2, 0)
    # The arguments that count for the id are the caller's.
    again = shared_worker.task("retry_changed").apply_async((["a", "b", "c"],), message_id=m)
    assert (again.duplicate, again.id) == (True, result.id)


def test_arguments_that_the_body_changes_are_the_same_message(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("mutate").apply_async(([], 2), message_id=m)

    assert result.get(timeout=TIMEOUT) == ["run 0", "run 1", "run 2"]
    row = shared_worker.row("mutate", m)
    assert (row.processed_status, row.attempt, row.duplicates) == (SUCCESS, 2, 0)
    again = shared_worker.task("mutate").apply_async(([], 2), message_id=m)
    assert (again.duplicate, again.get(timeout=TIMEOUT)) == (True, ["run 0", "run 1", "run 2"])


def test_a_retry_that_cannot_be_published_fails_the_row(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("retry_nowhere").apply_async(message_id=m)

    row = shared_worker.wait_until_done("retry_nowhere", m)
    # Celery turns the error into a rejection; and that, since 5.7, into a failure.
    if CELERY >= (5, 7):
        assert isinstance(result.get(timeout=TIMEOUT, propagate=False), Reject)
    assert (row.processed_status, row.attempt) == (FAILURE, 0)
    assert "JSON" in str(row.error)
