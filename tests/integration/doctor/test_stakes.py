"""What doctor says is at stake, where no other test shows it."""

from __future__ import annotations

import pytest

from celery_idempotent import AlreadyFailedError
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT, wait_until


@pytest.mark.parametrize(
    ("task", "becomes", "errbacks"), [("fail.tracked", AlreadyFailedError, 2), ("fail", ValueError, 1)]
)
def test_a_failure_that_is_delivered_again(
    shared_worker: SharedWorker, task: str, becomes: type[Exception], errbacks: int
) -> None:
    """With ``track_started`` its result is overwritten before the guard can see it."""
    m = unique()
    call = shared_worker.task("errback.call").s()
    result = shared_worker.task(task).apply_async(message_id=m, link_error=call)
    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), ValueError)
    shared_worker.wait_until_done(task, m)

    shared_worker.deliver(task, message_id=m, task_id=result.id, link_error=call)

    shared_worker.wait_for_row(task, m, lambda row: row.duplicates == 1)
    wait_until(
        lambda: isinstance(shared_worker.task(task).AsyncResult(result.id).result, becomes),
        describe=lambda: repr(shared_worker.task(task).AsyncResult(result.id).result),
    )
    told = [note for note in shared_worker.ledger.entries(task="errback.call") if note.detail == result.id]
    assert len(told) == errbacks
