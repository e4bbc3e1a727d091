"""What doctor says is at stake, where no other test shows it."""

from __future__ import annotations

import pytest

from celery_idempotent import AlreadyFailedError
from tests.integration.conftest import bench, shared_bench
from tests.support.bench import PATIENCE, Bench
from tests.support.waiting import wait_until

__all__ = ["bench", "shared_bench"]


@pytest.mark.parametrize(
    ("task", "becomes", "errbacks"), [("fail.tracked", AlreadyFailedError, 2), ("fail", ValueError, 1)]
)
def test_a_failure_that_is_delivered_again(bench: Bench, task: str, becomes: type[Exception], errbacks: int) -> None:
    """With ``track_started`` its result is overwritten before the guard can see it."""
    m = bench.fresh()
    call = bench.task("errback.call").s()
    result = bench.task(task).apply_async(message_id=m, link_error=call)
    assert isinstance(result.get(timeout=PATIENCE, propagate=False), ValueError)
    bench.done(task, m)

    bench.deliver(task, message_id=m, task_id=result.id, link_error=call)

    bench.wait_for_row(task, m, lambda row: row.duplicates == 1)
    wait_until(
        lambda: isinstance(bench.task(task).AsyncResult(result.id).result, becomes),
        timeout=PATIENCE,
        describe=lambda: repr(bench.task(task).AsyncResult(result.id).result),
    )
    told = [note for note in bench.ledger.entries(task="errback.call") if note.detail == result.id]
    assert len(told) == errbacks
