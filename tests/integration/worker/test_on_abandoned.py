"""A copy that arrives when its message's lease has run out: run again, failed, or replayed; and the owner that comes too late."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import chord

from celery_idempotent import AlreadyFailedError
from celery_idempotent.core.records import Claim, Claimed, MessageKey, NewMessage, Owner, ProcessedStatus, Status
from celery_idempotent.message.canvas_ids import derived
from celery_idempotent.message.serialization import decode_result, encode_message, encode_result
from celery_idempotent.producer.recorded import republish
from tests.support.deployment import unique
from tests.support.provider import Provider
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT, wait_until

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE


def leave_behind(
    shared_worker: SharedWorker, task: str, message_id: str, *args: Any, **options: Any
) -> tuple[str, Claim]:
    """Leave a message as a worker that died does: claimed, its lease over. Return its task id and the claim."""
    task_id = str(uuid4())
    message = NewMessage(
        key=MessageKey(message_id, task),
        task_id=task_id,
        message=encode_message(args, {}, {**options, "task_id": task_id}, serializer="json"),
    )
    claimed = shared_worker.app.queue_log.store.claim(message, worker="gone@test:1", lease=0.01, grace=0.0)
    assert isinstance(claimed, Claimed)
    return task_id, claimed.claim


def run_out(shared_worker: SharedWorker, task: str, message_id: str) -> None:
    """Wait until the lease is over, by the store's clock."""
    row = shared_worker.wait_for_row(task, message_id, lambda row: row.lease_left <= 0)
    assert row.status is Status.PROCESSING


@pytest.mark.parametrize("task", ["left.rerun", "left.late"])
def test_it_is_run_again(shared_worker: SharedWorker, task: str) -> None:
    """Where the task says so, and by default where it is acknowledged late."""
    m, gate = unique(), shared_worker.path("gate")
    Path(gate).touch()
    task_id, _ = leave_behind(shared_worker, task, m, gate, "value")
    run_out(shared_worker, task, m)

    copy = shared_worker.deliver(task, (gate, "value"), message_id=m, task_id=task_id)

    assert copy.get(timeout=TIMEOUT) == "value"
    row = shared_worker.row(task, m)
    assert (row.status, row.processed_status, row.token) == (Status.DONE, SUCCESS, 2)
    assert len(shared_worker.starts(task, m)) == 1


@pytest.mark.parametrize("task", ["left.fail", "left.early"])
def test_an_abandoned_message_fails(shared_worker: SharedWorker, task: str) -> None:
    """Where the task says so, and by default where it is acknowledged early."""
    m, gate = unique(), shared_worker.path("gate")
    task_id, _ = leave_behind(shared_worker, task, m, gate, "value")
    run_out(shared_worker, task, m)

    copy = shared_worker.deliver(task, (gate, "value"), message_id=m, task_id=task_id)

    with pytest.raises(AlreadyFailedError, match="abandoned"):
        copy.get(timeout=TIMEOUT)
    row = shared_worker.row(task, m)
    assert (row.status, row.processed_status, row.token) == (Status.DONE, FAILURE, 1)
    assert str(row.error).startswith("abandoned")
    assert shared_worker.starts(task, m) == []


@pytest.mark.parametrize("task", ["left.rerun", "left.fail"])
def test_a_recovery_point_is_replayed_whatever_the_task_says(shared_worker: SharedWorker, task: str) -> None:
    """The body ran; the worker that takes over sends its callbacks."""
    m, heard = unique(), unique("heard")
    link = shared_worker.task("told").s().set(message_id=heard)
    task_id, claim = leave_behind(shared_worker, task, m, "no gate", "value")
    assert shared_worker.app.queue_log.store.checkpoint(claim, result=encode_result(shared_worker.app, "value"))
    run_out(shared_worker, task, m)

    copy = shared_worker.deliver(task, ("no gate", "value"), message_id=m, task_id=task_id, link=link)

    assert copy.get(timeout=TIMEOUT) == "value"
    row = shared_worker.wait_until_done(task, m)
    assert (row.processed_status, row.token, row.message) == (SUCCESS, 2, None)
    assert shared_worker.wait_until_done("told", heard).processed_status is SUCCESS
    assert shared_worker.starts(task, m) == []


def test_a_recovery_point_without_a_result_cannot_be_replayed(shared_worker: SharedWorker) -> None:
    m, heard = unique(), unique("heard")
    task_id, claim = leave_behind(shared_worker, "left.rerun", m, "no gate", "value")
    assert shared_worker.app.queue_log.store.checkpoint(claim, result=None)
    run_out(shared_worker, "left.rerun", m)

    copy = shared_worker.deliver(
        "left.rerun",
        ("no gate", "value"),
        message_id=m,
        task_id=task_id,
        link=shared_worker.task("told").s().set(message_id=heard),
    )

    with pytest.raises(AlreadyFailedError, match="result could not be kept"):
        copy.get(timeout=TIMEOUT)
    row = shared_worker.wait_until_done("left.rerun", m)
    assert (row.processed_status, row.token) == (FAILURE, 2)
    assert (shared_worker.starts("left.rerun", m), shared_worker.find("told", heard)) == ([], None)


def test_an_owner_that_lost_its_claim_is_not_heard(shared_worker: SharedWorker) -> None:
    """Its body goes on, which nothing can prevent; its result, its callbacks and its outcome are refused."""
    m, gate, heard = unique(), shared_worker.path("gate"), unique("heard")
    store = shared_worker.app.queue_log.store
    first = shared_worker.task("gated").apply_async(
        (gate, "too late"), message_id=m, link=shared_worker.task("told").s().set(message_id=heard)
    )
    shared_worker.wait_for_starts("gated", m)
    row = shared_worker.row("gated", m)
    assert row.worker is not None
    assert store.expire(Owner(row.key, row.worker))
    taken = store.take_over(
        shared_worker.row("gated", m), task_id=str(uuid4()), worker="other@test:1", lease=60.0, attempt=0
    )
    assert isinstance(taken, Claimed)
    assert store.complete(taken.claim, result=encode_result(shared_worker.app, "in time"))

    Path(gate).touch()

    shared_worker.worker.wait_for_log(f"gated[{m}]: the claim on message")
    row = shared_worker.row("gated", m)
    assert (row.status, row.processed_status, row.token) == (Status.DONE, SUCCESS, 2)
    # The caller is served by a copy, as it will be: with the new owner's result.
    shared_worker.deliver("gated", (gate, "too late"), message_id=m, task_id=first.id)
    assert first.get(timeout=TIMEOUT) == "in time"
    assert shared_worker.find("told", heard) is None
    assert len(shared_worker.starts("gated", m)) == 1


def test_an_owner_that_lost_its_claim_does_not_retry(shared_worker: SharedWorker) -> None:
    m, gate = unique(), shared_worker.path("gate")
    store = shared_worker.app.queue_log.store
    shared_worker.task("gated_retry").apply_async((gate,), message_id=m)
    shared_worker.wait_for_starts("gated_retry", m)
    row = shared_worker.row("gated_retry", m)
    assert row.worker is not None
    assert store.expire(Owner(row.key, row.worker))
    taken = store.take_over(
        shared_worker.row("gated_retry", m), task_id=str(uuid4()), worker="other@test:1", lease=60.0, attempt=0
    )
    assert isinstance(taken, Claimed)

    Path(gate).touch()

    shared_worker.worker.wait_for_log(f"gated_retry[{m}]: the claim on message")
    row = shared_worker.row("gated_retry", m)
    assert (row.status, row.attempt, row.token) == (Status.PROCESSING, 0, 2)
    assert store.fail(taken.claim, error="the end of the test")
    assert len(shared_worker.starts("gated_retry", m)) == 1


# -- a task that is asked ------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(shared_worker: SharedWorker) -> Path:
    """Return the books of the provider that the task asks."""
    directory = Path(shared_worker.path("provider"))
    Provider(directory)
    return directory


def asked(directory: Path) -> list[str]:
    """Return the messages that the task was asked about."""
    path = directory / "asked"
    return path.read_text().split("\n")[:-1] if path.exists() else []


@pytest.mark.parametrize("by", ["message", "recovery"])
@pytest.mark.parametrize("task", ["asked.late", "asked.early"])
def test_a_task_is_asked_and_it_was_done(shared_worker: SharedWorker, directory: Path, task: str, by: str) -> None:
    """Its chain goes on with the result that the task found, whoever brings the message back."""
    m, heard = unique(), unique("heard")
    (directory / "answer").write_text("done")
    link = shared_worker.task("told").s().set(message_id=heard)
    task_id, claim = leave_behind(shared_worker, task, m, str(directory), link=[link])
    key = derived("step", task, m, task_id, 0, "charge")
    charge = Provider(directory).charge("asked", key)
    run_out(shared_worker, task, m)

    if by == "message":
        result = shared_worker.deliver(task, (str(directory),), message_id=m, task_id=task_id, link=link)
    else:
        assert republish(shared_worker.app.queue_log, shared_worker.row(task, m))
        result = shared_worker.task(task).AsyncResult(task_id)

    assert result.get(timeout=TIMEOUT) == charge
    row = shared_worker.wait_until_done(task, m)
    assert (row.processed_status, row.token) == (SUCCESS, claim.token + 1)
    assert row.result is not None
    assert decode_result(shared_worker.app, row.result) == charge
    assert shared_worker.wait_until_done("told", heard).processed_status is SUCCESS
    assert (asked(directory), shared_worker.starts(task, m)) == ([f"{m} gone@test:1"], [])


def test_a_task_is_asked_and_its_chord_goes_on(shared_worker: SharedWorker, directory: Path) -> None:
    (directory / "answer").write_text("done")
    told = shared_worker.task("told")
    m = unique()
    member = shared_worker.task("asked.late").s(str(directory)).set(message_id=m)
    leave_behind(shared_worker, "asked.late", m, str(directory))
    run_out(shared_worker, "asked.late", m)
    result = chord([member, told.s("other")], told.s(), app=shared_worker.app).delay()
    assert result.get(timeout=TIMEOUT) is not None
    assert shared_worker.wait_until_done("asked.late", m).processed_status is SUCCESS


def test_a_task_is_asked_and_says_rerun(shared_worker: SharedWorker, directory: Path) -> None:
    m = unique()
    (directory / "answer").write_text("rerun")
    task_id, _ = leave_behind(shared_worker, "asked.early", m, str(directory))
    run_out(shared_worker, "asked.early", m)
    result = shared_worker.deliver("asked.early", (str(directory),), message_id=m, task_id=task_id)
    assert result.get(timeout=TIMEOUT)["what"] == "asked"
    assert len(shared_worker.starts("asked.early", m)) == 1


def test_a_task_is_asked_and_says_fail(shared_worker: SharedWorker, directory: Path) -> None:
    m = unique()
    (directory / "answer").write_text("fail")
    task_id, _ = leave_behind(shared_worker, "asked.late", m, str(directory))
    run_out(shared_worker, "asked.late", m)
    result = shared_worker.deliver("asked.late", (str(directory),), message_id=m, task_id=task_id)
    with pytest.raises(AlreadyFailedError, match="abandoned"):
        result.get(timeout=TIMEOUT)
    assert shared_worker.row("asked.late", m).processed_status is FAILURE


@pytest.mark.parametrize("answer", ["nonsense", None], ids=["nonsense", "an error"])
def test_a_task_that_gives_no_answer_is_asked_again(
    shared_worker: SharedWorker, directory: Path, answer: str | None
) -> None:
    """Nothing is lost, and the log says why it waits."""
    m = unique()
    if answer is not None:
        (directory / "answer").write_text(answer)
    task_id, _ = leave_behind(shared_worker, "asked.late", m, str(directory))
    run_out(shared_worker, "asked.late", m)
    result = shared_worker.deliver("asked.late", (str(directory),), message_id=m, task_id=task_id)

    shared_worker.worker.wait_for_log(f"asked.late[{m}] is left as it is, since on_abandoned gave no answer")
    row = shared_worker.row("asked.late", m)
    assert (row.status, row.token, row.worker) == (Status.PROCESSING, 1, "gone@test:1")

    (directory / "answer").write_text("rerun")
    assert result.get(timeout=TIMEOUT)["what"] == "asked"
    assert len(asked(directory)) == 2
    assert len(shared_worker.starts("asked.late", m)) == 1


def test_a_task_is_asked_about_a_child_that_was_killed(shared_worker: SharedWorker, directory: Path) -> None:
    """It charged and died: the provider knows, and it is not run again, although the broker has no copy of it."""
    m = unique()
    (directory / "answer").write_text("done")
    result = shared_worker.task("asked.dying").apply_async((str(directory),), message_id=m)
    shared_worker.wait_for_row(
        "asked.dying", m, lambda row: row.status is Status.PROCESSING and row.lease_left <= 0, timeout=TIMEOUT
    )
    assert republish(shared_worker.app.queue_log, shared_worker.row("asked.dying", m))
    row = shared_worker.wait_until_done("asked.dying", m)
    assert row.processed_status is SUCCESS
    wait_until(
        lambda: shared_worker.task("asked.dying").AsyncResult(result.id).state == "SUCCESS", describe="the result"
    )
    assert len(shared_worker.starts("asked.dying", m)) == 1
    assert Provider(directory).charged() == ["asked"]
