"""Messages that are taken back: revoked or expired before they start, terminated while they run."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import states
from celery.exceptions import TaskRevokedError

from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, ProcessedStatus, Status
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT, wait_until

FAILURE = ProcessedStatus.FAILURE


def revoke(shared_worker: SharedWorker, task_id: str, **options: Any) -> str:
    """Revoke a task, wait until the worker says that it knows, and answer its id."""
    (answer,) = wait_until(
        lambda: shared_worker.app.control.revoke(task_id, reply=True, timeout=TIMEOUT, limit=1, **options),
        describe="the worker's answer to a revoke",
    )
    assert all("ok" in reply for reply in answer.values()), answer
    return task_id


def test_a_message_revoked_before_it_starts_is_a_failure(shared_worker: SharedWorker) -> None:
    m = unique()
    task_id = revoke(shared_worker, unique("task"))

    result = shared_worker.task("echo").apply_async((1,), message_id=m, task_id=task_id)

    with pytest.raises(TaskRevokedError):
        result.get(timeout=TIMEOUT)
    row = shared_worker.wait_until_done("echo", m)
    assert (row.processed_status, row.error, row.token) == (FAILURE, "revoked", 0)
    assert row.message is not None
    assert shared_worker.starts("echo", m) == []


def test_a_copy_of_a_revoked_message_does_not_run(shared_worker: SharedWorker) -> None:
    m = unique()
    shared_worker.task("echo").apply_async((1,), message_id=m, task_id=revoke(shared_worker, unique("task")))
    shared_worker.wait_until_done("echo", m)

    copy = shared_worker.deliver("echo", (1,), message_id=m)

    error = copy.get(timeout=TIMEOUT, propagate=False)
    assert (type(error).__name__, error.args) == ("AlreadyFailedError", (m, "revoked"))
    assert shared_worker.starts("echo", m) == []


def test_a_revoked_message_may_be_sent_again_where_the_task_says_so(shared_worker: SharedWorker) -> None:
    order, flag = unique("order"), shared_worker.path("flag")
    Path(flag).touch()
    first = shared_worker.task("order.again").apply_async((order, flag), task_id=revoke(shared_worker, unique("task")))
    shared_worker.wait_until_done("order.again", f"order:{order}")

    second = shared_worker.task("order.again").delay(order, flag)

    assert second.id != first.id
    assert second.get(timeout=TIMEOUT) == f"{order} at last"


def test_a_message_that_is_terminated_while_it_runs_is_a_failure(shared_worker: SharedWorker) -> None:
    m, gate = unique(), shared_worker.path("gate")
    result = shared_worker.task("gated").apply_async((gate,), message_id=m)
    (start,) = shared_worker.wait_for_starts("gated", m)

    revoke(shared_worker, result.id, terminate=True, signal="SIGKILL")

    with pytest.raises(TaskRevokedError):
        result.get(timeout=TIMEOUT)
    row = shared_worker.wait_until_done("gated", m)
    assert (row.processed_status, row.error) == (FAILURE, "revoked: it was terminated while it ran")
    assert (row.token, row.lease_expires_at) == (1, None)
    assert shared_worker.starts("gated", m) == [start]
    assert shared_worker.ledger.ends(task_id=result.id) == []


@pytest.mark.parametrize("how", ["seconds", "date"])
def test_a_message_that_expired_before_it_started_is_a_failure(shared_worker: SharedWorker, how: str) -> None:
    m = unique()
    due = datetime.now(UTC) + timedelta(seconds=0.2)

    # It is not looked at before its countdown is over.
    result = shared_worker.task("echo").apply_async(
        (1,), message_id=m, countdown=0.6, expires=0.2 if how == "seconds" else due
    )

    with pytest.raises(TaskRevokedError):
        result.get(timeout=TIMEOUT)
    row = shared_worker.wait_until_done("echo", m)
    assert (row.processed_status, row.token) == (FAILURE, 0)
    assert str(row.error).startswith("expired")
    assert shared_worker.starts("echo", m) == []
    assert result.state == states.REVOKED


def test_a_message_that_is_in_time_runs(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("echo").apply_async((1,), message_id=m, expires=600)

    assert result.get(timeout=TIMEOUT) == 1
    assert shared_worker.row("echo", m).status is Status.DONE


def test_a_revoked_copy_leaves_the_row_of_the_first_message_alone(shared_worker: SharedWorker) -> None:
    m = unique()
    first = shared_worker.task("echo").apply_async((1,), message_id=m, countdown=600)

    copy = shared_worker.deliver("echo", (1,), message_id=m, task_id=revoke(shared_worker, unique("task")))

    with pytest.raises(TaskRevokedError):
        copy.get(timeout=TIMEOUT)
    row = shared_worker.row("echo", m)
    assert (row.status, row.task_id, row.error) == (Status.PENDING, first.id, None)


def test_an_id_is_free_after_its_message_was_revoked_unbegun(shared_worker: SharedWorker) -> None:
    m = unique()
    shared_worker.task("echo").apply_async((1,), message_id=m, task_id=revoke(shared_worker, unique("task")))
    shared_worker.wait_until_done("echo", m)

    second = shared_worker.task("echo").apply_async((2,), message_id=m)

    assert not second.duplicate
    assert second.get(timeout=TIMEOUT) == 2


def test_an_id_is_free_for_a_call_by_name_too(shared_worker: SharedWorker) -> None:
    m = unique()
    shared_worker.task("echo").apply_async((1,), message_id=m, task_id=revoke(shared_worker, unique("task")))
    shared_worker.wait_until_done("echo", m)

    assert shared_worker.app.send_task("echo", (2,), message_id=m).get(timeout=TIMEOUT) == 2


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_discarded_message_whose_owner_died_has_failed(shared_worker: SharedWorker, how: str) -> None:
    m, task_id = unique(), unique("task")
    key, store = MessageKey(m, "echo"), shared_worker.app.queue_log.store
    claimed = store.claim(NewMessage(key, task_id, message=b""), worker="dead:1", lease=60.0, grace=0.0)
    assert isinstance(claimed, Claimed)
    store.expire(claimed.claim)
    if how == "revoked":
        revoke(shared_worker, task_id)

    late: dict[str, Any] = {} if how == "revoked" else {"countdown": 0.6, "expires": 0.2}
    shared_worker.deliver("echo", (1,), message_id=m, task_id=task_id, **late)

    row = shared_worker.wait_until_done("echo", m)
    assert (row.processed_status, str(row.error).partition(":")[0], row.token) == (FAILURE, how, 1)
    assert shared_worker.starts("echo", m) == []


def test_a_row_knows_of_a_revoke_that_a_new_worker_does_not(shared_worker: SharedWorker) -> None:
    """It was discarded while the owner's lease lived; then the owner is dead, and a worker that knows nothing gets it."""
    m, task_id = unique(), unique("task")
    key, store = MessageKey(m, "echo"), shared_worker.app.queue_log.store
    claimed = store.claim(NewMessage(key, task_id, message=b""), worker="dead:1", lease=3600.0, grace=0.0)
    assert isinstance(claimed, Claimed)
    revoke(shared_worker, task_id)
    shared_worker.deliver("echo", (1,), message_id=m, task_id=task_id)
    wait_until(lambda: shared_worker.row("echo", m).error == "revoked", describe="the note")

    store.expire(claimed.claim)
    stranger = shared_worker.deliver("echo", (1,), message_id=m)  # the worker does not know this task id

    error = stranger.get(timeout=TIMEOUT, propagate=False)
    assert (type(error).__name__, error.args) == ("AlreadyFailedError", (m, "revoked"))
    row = shared_worker.wait_until_done("echo", m)
    assert (row.processed_status, row.error) == (FAILURE, "revoked")
    assert shared_worker.starts("echo", m) == []


def test_a_discarded_recovery_point_has_succeeded(shared_worker: SharedWorker) -> None:
    m, task_id = unique(), unique("task")
    key, store = MessageKey(m, "echo"), shared_worker.app.queue_log.store
    claimed = store.claim(NewMessage(key, task_id, message=b""), worker="dead:1", lease=60.0, grace=0.0)
    assert isinstance(claimed, Claimed)
    store.checkpoint(claimed.claim, result=None)
    store.expire(claimed.claim)
    revoke(shared_worker, task_id)

    shared_worker.deliver("echo", (1,), message_id=m, task_id=task_id)

    row = shared_worker.wait_until_done("echo", m)
    assert (row.processed_status, row.token) == (ProcessedStatus.SUCCESS, 2)
