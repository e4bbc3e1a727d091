"""A task that retries is one message: as many runs as it asks for, one row, one result."""

from __future__ import annotations

import pytest

from celery_idempotent import AlreadyFailedError
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker


@pytest.mark.parametrize("countdown", [0, 1], ids=["countdown-0", "with-a-countdown"])
def test_self_retry_twice_then_success_in_a_unique_task(guarded: SharedWorker, countdown: float) -> None:
    key = unique()

    result = guarded.task("retried").delay(key, 2, countdown)
    again = guarded.task("retried").delay(key, 2, countdown)

    assert (again.id, again.duplicate) == (result.id, True)
    assert result.get(timeout=60) == f"{key} after 2 retries"
    row = guarded.wait_until_done("retried", f"retried:{key}")
    guarded.wait_until_idle()
    starts = guarded.starts_under(key)
    assert [start.retries for start in starts] == [0, 1, 2]
    assert {start.message_id for start in starts} == {f"retried:{key}"}
    assert (row.status, row.processed_status, row.attempt, row.token) == ("done", "success", 2, 3)
    assert guarded.task("retried").delay(key, 2, countdown).get(timeout=60) == result.get()


@pytest.mark.parametrize("both_workers", ["redis"], indirect=True)
def test_a_retry_that_ends_before_its_predecessor_has_stored_that_it_retries(
    guarded: SharedWorker, plain: SharedWorker
) -> None:
    """Celery publishes a retry first, and stores the state RETRY then: it may hide the end of the next attempt for ever."""
    key = unique()

    result, hidden = (shared_worker.task("hurried").delay(key) for shared_worker in (guarded, plain))

    for shared_worker in (guarded, plain):
        shared_worker.wait_for_starts_under(key, 2)
        shared_worker.wait_until_idle()
    # What the backend answers now.
    stored, stored_by_plain = (
        shared_worker.app.backend.get_task_meta(asked.id)
        for shared_worker, asked in ((guarded, result), (plain, hidden))
    )
    assert (stored["status"], type(stored["result"])) == ("FAILURE", AlreadyFailedError)
    assert f"{key} failed at last" in str(stored["result"])
    assert len(guarded.starts_under(key)) == 2
    assert stored_by_plain["status"] == "RETRY"


@pytest.mark.parametrize("both_workers", ["redis"], indirect=True)
def test_args_mutated_by_the_body_and_self_retry_with_other_args(guarded: SharedWorker, plain: SharedWorker) -> None:
    key = unique()

    result = guarded.task("changing").delay(key, [])

    # The id and the fingerprint are the call's, even if the body changes its arguments.
    assert result.get(timeout=60) == [0, 100, 1, 100, 2]
    guarded.wait_until_idle()
    starts = guarded.starts_under(key)
    assert [start.retries for start in starts] == [0, 1, 2]
    (message_id,) = {start.message_id for start in starts}
    row = guarded.wait_until_done("changing", message_id or "")
    assert (row.status, row.processed_status, row.task_id) == ("done", "success", result.id)
    assert guarded.task("changing").delay(key, [0, 100]).get(timeout=60) == [0, 100, 0, 100, 1, 100, 2]
    # Nothing leaks: the id is free again when its time is up (`unique_for`), and the same call runs once more.
    assert guarded.calls_until_it_runs("changing", key, []).get(timeout=60) == [0, 100, 1, 100, 2]
    assert plain.task("changing").delay(key, []).get(timeout=60) == [0, 100, 1, 100, 2]
