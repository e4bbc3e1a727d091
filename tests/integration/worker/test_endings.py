"""How a run ends, and what its row says of it: Ignore, Reject, replace, and errors of every kind."""

from __future__ import annotations

from typing import Any

import pytest
from celery import states
from celery.exceptions import Reject

from celery_idempotent.core.records import ProcessedStatus, Row, Status
from celery_idempotent.producer.relay import relay
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.versions import CELERY
from tests.support.waiting import TIMEOUT, wait_until

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE


def ending(row: Row) -> tuple[Status, ProcessedStatus | None, int, int]:
    return row.status, row.processed_status, row.token, row.attempt


def test_a_success(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("echo").apply_async(("there",), message_id=m)

    assert result.get(timeout=TIMEOUT) == "there"
    row = shared_worker.row("echo", m)
    assert ending(row) == (Status.DONE, SUCCESS, 1, 0)
    assert (row.task_id, row.queue, row.error, row.duplicates) == (result.id, shared_worker.spec.queue, None, 0)
    assert (row.message, row.result is None, row.expires_at) == (None, False, None)
    assert row.processed_timestamp is not None
    assert row.created_timestamp <= row.processed_timestamp <= row.read_at
    # Who ran it stays to be read.
    (start,) = shared_worker.starts("echo", m)
    assert row.worker is None or row.worker.startswith(f"{start.worker}:{start.pid}")


def test_a_failure(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("fail").apply_async(("a reason",), message_id=m)

    with pytest.raises(ValueError, match="a reason"):
        result.get(timeout=TIMEOUT)
    row = shared_worker.row("fail", m)
    assert ending(row) == (Status.DONE, FAILURE, 1, 0)
    assert (row.error, row.result, row.message is None) == ("ValueError: a reason", None, False)


def test_an_error_that_celery_cannot_rebuild_is_a_failure(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("fail_oddly").apply_async(message_id=m)

    assert "7: odd" in str(result.get(timeout=TIMEOUT, propagate=False))
    row = shared_worker.row("fail_oddly", m)
    assert ending(row) == (Status.DONE, FAILURE, 1, 0)
    assert row.error is not None
    assert row.error.endswith("UnbuildableError: 7: odd")


def test_an_ignored_message_is_done_without_a_result(shared_worker: SharedWorker) -> None:
    m = unique()
    result = shared_worker.task("ignored").apply_async(message_id=m)

    row = shared_worker.wait_until_done("ignored", m)

    assert ending(row) == (Status.DONE, SUCCESS, 1, 0)
    assert (row.error, row.result, row.message) == ("ignored", None, None)
    # A copy of it has no more to say than the original had.
    shared_worker.deliver("ignored", message_id=m, task_id=result.id)
    shared_worker.wait_for_row("ignored", m, lambda row: row.duplicates == 1)
    assert len(shared_worker.starts("ignored", m)) == 1
    assert result.state == states.PENDING


def test_a_rejected_message_is_a_failure(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("rejected").apply_async(message_id=m)

    row = shared_worker.wait_until_done("rejected", m)
    if CELERY >= (5, 7):
        assert isinstance(result.get(timeout=TIMEOUT, propagate=False), Reject)
    else:  # Celery stores nothing for a rejected message
        assert result.state == states.PENDING
    assert ending(row) == (Status.DONE, FAILURE, 1, 0)
    assert "not for me" in str(row.error)


def test_a_requeued_message_comes_back_and_runs(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("requeued").apply_async((shared_worker.path("flag"),), message_id=m)

    assert result.get(timeout=TIMEOUT) == "the second time"
    assert [start.retries for start in shared_worker.starts("requeued", m)] == [0, 0]
    row = shared_worker.row("requeued", m)
    assert ending(row) == (Status.DONE, SUCCESS, 2, 0)
    assert row.duplicates == 0


def test_a_requeued_message_that_was_acknowledged_is_relayed(shared_worker: SharedWorker) -> None:
    m = unique("m")
    result = shared_worker.task("requeued_early").apply_async((shared_worker.path("flag"),), message_id=m)
    shared_worker.wait_for_row("requeued_early", m, lambda row: row.token == 1 and row.status is Status.PENDING)
    shared_worker.wait_for_row("requeued_early", m, lambda row: row.published_at is None)

    assert relay(shared_worker.app.queue_log).published == 1

    assert result.get(timeout=TIMEOUT) == "the second time"
    assert ending(shared_worker.row("requeued_early", m)) == (Status.DONE, SUCCESS, 2, 0)


@pytest.mark.parametrize(
    ("kind", "value"), [("guarded", 3), ("identified", 3), ("plain", 3), ("chain", 6), ("group", [3, 7])]
)
def test_a_replaced_message_is_done_and_its_task_id_goes_on(shared_worker: SharedWorker, kind: str, value: Any) -> None:
    m = unique()

    result = shared_worker.task("replace_by").apply_async((kind,), message_id=m)

    assert result.get(timeout=TIMEOUT) == value
    row = shared_worker.wait_until_done("replace_by", m)
    assert ending(row) == (Status.DONE, SUCCESS, 1, 0)
    assert (row.error, row.result, row.message) == ("replaced", None, None)
    if kind in ("guarded", "identified"):
        replacement = shared_worker.row("add", result.id if kind == "guarded" else f"{result.id}:replacement")
        assert (replacement.task_id, *ending(replacement)) == (result.id, Status.DONE, SUCCESS, 1, 0)
    # A copy of the replaced message does not run, and does not replace itself a second time.
    shared_worker.deliver("replace_by", (kind,), message_id=m, task_id=result.id)
    shared_worker.wait_for_row("replace_by", m, lambda row: row.duplicates == 1)
    assert len(shared_worker.starts("replace_by", m)) == 1
    assert len(shared_worker.ledger.starts("add", task_id=result.id)) == (kind not in ("plain", "group"))
    assert result.get(timeout=TIMEOUT) == value


def test_a_caller_of_a_replaced_message_gets_the_first_result(shared_worker: SharedWorker) -> None:
    m = unique()
    first = shared_worker.task("replace_by").apply_async(("chain",), message_id=m)

    second = shared_worker.task("replace_by").apply_async(("chain",), message_id=m)

    assert (second.id, second.duplicate, second.get(timeout=TIMEOUT)) == (first.id, True, 6)


def test_a_message_may_replace_itself_with_other_arguments(shared_worker: SharedWorker) -> None:
    result = shared_worker.task("replace_by_itself").delay(2)

    assert result.get(timeout=TIMEOUT) == "zero"
    assert len(shared_worker.ledger.starts("replace_by_itself", task_id=result.id)) == 3
    row = shared_worker.row("replace_by_itself", result.id)
    assert ending(row) == (Status.DONE, SUCCESS, 3, 0)


def test_a_message_may_replace_itself_under_its_own_id(shared_worker: SharedWorker) -> None:
    name = unique("name")

    result = shared_worker.task("countdown_by_name").delay(name, 2)

    assert result.get(timeout=TIMEOUT) == "zero"
    assert len(shared_worker.starts("countdown_by_name", f"countdown:{name}")) == 3
    row = shared_worker.row("countdown_by_name", f"countdown:{name}")
    assert (row.task_id, *ending(row)) == (result.id, Status.DONE, SUCCESS, 3, 0)


def test_a_replacement_that_cannot_be_published_is_a_failure(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("replace_by").apply_async(("unpublishable",), message_id=m)

    assert "JSON" in str(result.get(timeout=TIMEOUT, propagate=False))
    row = shared_worker.wait_until_done("replace_by", m)
    assert ending(row) == (Status.DONE, FAILURE, 1, 0)
    assert "JSON" in str(row.error)


def test_a_body_that_leaves_its_process_does_not_run_again(shared_worker: SharedWorker) -> None:
    """``SystemExit`` in a body ends the pool's process; with an early acknowledgement that is the message's end."""
    m = unique()

    result = shared_worker.task("exit_body").apply_async(message_id=m)

    row = shared_worker.wait_until_done("exit_body", m)
    assert ending(row) == (Status.DONE, FAILURE, 1, 0)
    if CELERY >= (5, 7):
        wait_until(lambda: result.state == states.FAILURE, describe="the failure in the backend")
    else:  # Celery cannot store it: SystemExit is not JSON serializable
        assert result.state == states.PENDING
    assert len(shared_worker.starts("exit_body", m)) == 1
