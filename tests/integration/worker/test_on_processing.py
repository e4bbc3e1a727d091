"""A copy that arrives while its message runs: held, skipped or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery import states

from celery_idempotent import AlreadyProcessingError
from celery_idempotent.core.records import ProcessedStatus, Status
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT

SUCCESS = ProcessedStatus.SUCCESS


@pytest.mark.parametrize("same_task_id", [True, False], ids=["redelivered", "another task id"])
def test_a_copy_is_held_until_its_message_has_ended(shared_worker: SharedWorker, same_task_id: bool) -> None:
    m, gate = unique(), shared_worker.path("gate")
    first = shared_worker.task("busy.hold").apply_async((gate, "value"), message_id=m)
    shared_worker.wait_for_starts("busy.hold", m)

    copy = shared_worker.deliver("busy.hold", (gate, "value"), message_id=m, task_id=first.id if same_task_id else None)
    shared_worker.wait_until_held("busy.hold", m)
    row = shared_worker.row("busy.hold", m)
    assert (row.status, row.token, row.duplicates) == (Status.PROCESSING, 1, 0)
    Path(gate).touch()

    assert first.get(timeout=TIMEOUT) == "value"
    assert copy.get(timeout=TIMEOUT) == "value"
    shared_worker.assert_done("busy.hold", m, SUCCESS, starts=1, token=1, duplicates=1)


def test_a_copy_is_held_as_often_as_it_takes(shared_worker: SharedWorker) -> None:
    """Each hold is longer than the one before."""
    m, gate = unique(), shared_worker.path("gate")
    first = shared_worker.task("busy.hold").apply_async((gate, "value"), message_id=m)
    shared_worker.wait_for_starts("busy.hold", m)

    copy = shared_worker.deliver("busy.hold", (gate, "value"), message_id=m)
    for seconds in ("1.", "2."):
        shared_worker.wait_until_held("busy.hold", m, seconds)
    Path(gate).touch()

    assert (first.get(timeout=TIMEOUT), copy.get(timeout=TIMEOUT)) == ("value", "value")
    assert len(shared_worker.starts("busy.hold", m)) == 1


@pytest.mark.parametrize("how", ["redelivered", "another task id", "by name"])
def test_a_held_copy_does_not_run_when_its_id_is_free(shared_worker: SharedWorker, how: str) -> None:
    """The id is free for calls long before the copy comes back."""
    m, gate = unique(), shared_worker.path("gate")
    first = shared_worker.task("busy.window").apply_async((gate, "value"), message_id=m)
    shared_worker.wait_for_starts("busy.window", m)

    if how == "by name":
        copy = shared_worker.app.send_task("busy.window", (gate, "value"), message_id=m)
    else:
        task_id = first.id if how == "redelivered" else None
        copy = shared_worker.deliver("busy.window", (gate, "value"), message_id=m, task_id=task_id)
    shared_worker.wait_until_held("busy.window", m)
    Path(gate).touch()

    assert (first.get(timeout=TIMEOUT), copy.get(timeout=TIMEOUT)) == ("value", "value")
    row = shared_worker.wait_for_row("busy.window", m, lambda row: row.duplicates >= 1)
    assert row.expired
    # The broker delivers the first message once more.
    shared_worker.deliver("busy.window", (gate, "value"), message_id=m, task_id=first.id)
    row = shared_worker.wait_for_row("busy.window", m, lambda row: row.duplicates >= 2)
    assert (row.status, row.processed_status, row.token) == (Status.DONE, SUCCESS, 1)
    assert len(shared_worker.starts("busy.window", m)) == 1
    # A call is another message.
    again = shared_worker.deliver("busy.window", (gate, "value"), message_id=m)
    assert again.get(timeout=TIMEOUT) == "value"
    assert [start.task_id for start in shared_worker.starts("busy.window", m)] == [first.id, again.id]


def test_a_copy_is_skipped_where_the_task_says_so(shared_worker: SharedWorker) -> None:
    m, gate = unique(), shared_worker.path("gate")
    first = shared_worker.task("busy.skip").apply_async((gate, "value"), message_id=m)
    shared_worker.wait_for_starts("busy.skip", m)

    copy = shared_worker.deliver("busy.skip", (gate, "value"), message_id=m)
    row = shared_worker.wait_for_row("busy.skip", m, lambda row: row.duplicates == 1)
    assert (row.status, row.token) == (Status.PROCESSING, 1)
    Path(gate).touch()

    assert first.get(timeout=TIMEOUT) == "value"
    assert copy.state == states.PENDING, "what is skipped says nothing"
    assert len(shared_worker.starts("busy.skip", m)) == 1


def test_a_copy_is_refused_where_the_task_says_so(shared_worker: SharedWorker) -> None:
    m, gate = unique(), shared_worker.path("gate")
    first = shared_worker.task("busy.raise").apply_async((gate, "value"), message_id=m)
    shared_worker.wait_for_starts("busy.raise", m)

    copy = shared_worker.deliver("busy.raise", (gate, "value"), message_id=m)

    with pytest.raises(AlreadyProcessingError) as caught:
        copy.get(timeout=TIMEOUT)
    assert caught.value.message_id == m
    assert caught.value.retry_after is not None
    assert 0 < caught.value.retry_after <= 60
    assert shared_worker.row("busy.raise", m).duplicates == 1
    Path(gate).touch()
    assert first.get(timeout=TIMEOUT) == "value"
    assert shared_worker.row("busy.raise", m).processed_status is SUCCESS


def test_a_call_while_a_message_runs_is_a_duplicate(shared_worker: SharedWorker) -> None:
    m, gate = unique(), shared_worker.path("gate")
    first = shared_worker.task("gated").apply_async((gate, "value"), message_id=m)
    shared_worker.wait_for_starts("gated", m)

    second = shared_worker.task("gated").apply_async((gate, "value"), message_id=m)

    assert (second.id, second.duplicate) == (first.id, True)
    row = shared_worker.row("gated", m)
    assert (row.status, row.processed_status, row.token) == (Status.PROCESSING, None, 1)
    assert row.lease_expires_at is not None
    assert 0 < row.lease_left <= 60
    (start,) = shared_worker.starts("gated", m)
    assert row.worker == f"{start.worker}:{start.pid}"
    Path(gate).touch()
    assert second.get(timeout=TIMEOUT) == "value"


def test_one_id_of_two_tasks_does_not_wait_for_each_other(shared_worker: SharedWorker) -> None:
    m, gate = unique(), shared_worker.path("gate")
    running = shared_worker.task("gated").apply_async((gate, "value"), message_id=m)
    shared_worker.wait_for_starts("gated", m)

    assert shared_worker.task("echo").apply_async((1,), message_id=m).get(timeout=TIMEOUT) == 1

    Path(gate).touch()
    assert running.get(timeout=TIMEOUT) == "value"
