"""Time limits: the soft one is an error of the body, the hard one ends the pool's process."""

from __future__ import annotations

import pytest
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from celery_idempotent.records import ProcessedStatus, Status
from tests.support.bench import PATIENCE, Bench

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE


def test_the_soft_limit_is_a_failure(bench: Bench) -> None:
    m = bench.fresh()

    result = bench.task("soft").apply_async((bench.path("flag"),), message_id=m)

    assert isinstance(result.get(timeout=PATIENCE, propagate=False), SoftTimeLimitExceeded)
    row = bench.row("soft", m)
    assert (row.status, row.processed_status, row.token) == (Status.DONE, FAILURE, 1)
    assert row.error is not None
    assert "SoftTimeLimitExceeded" in row.error
    assert len(bench.starts("soft", m)) == 1


def test_a_body_that_heeds_the_soft_limit_succeeds(bench: Bench) -> None:
    m = bench.fresh()

    result = bench.task("soft.tidy").apply_async(message_id=m)

    assert result.get(timeout=PATIENCE) == "cut short"
    assert bench.row("soft.tidy", m).processed_status is SUCCESS


@pytest.mark.parametrize("task", ["hard.early", "hard.early.unacknowledged", "hard.late"])
def test_the_hard_limit_is_a_failure(bench: Bench, task: str) -> None:
    m, flag = bench.fresh(), bench.path("flag")

    result = bench.task(task).apply_async((flag,), message_id=m)

    assert isinstance(result.get(timeout=PATIENCE, propagate=False), TimeLimitExceeded)
    row = bench.done(task, m)
    assert (row.processed_status, row.token, row.lease_expires_at) == (FAILURE, 1, None)
    assert row.error is not None
    assert "TimeLimitExceeded" in row.error
    # It is not left for a copy to be run again.
    copy = bench.deliver(task, (flag,), message_id=m, task_id=result.id)
    bench.wait_for_row(task, m, lambda row: row.duplicates == 1)
    assert isinstance(copy.get(timeout=PATIENCE, propagate=False), TimeLimitExceeded)
    assert len(bench.starts(task, m)) == 1


def test_the_hard_limit_gives_a_message_back_that_is_not_acknowledged_on_timeout(bench: Bench) -> None:
    m = bench.fresh()

    result = bench.task("hard.late.unacknowledged").apply_async((bench.path("flag"),), message_id=m)

    starts = bench.wait_for_starts("hard.late.unacknowledged", m, 2)
    assert [start.retries for start in starts] == [0, 0]
    assert starts[0].task_id == starts[1].task_id == result.id
    row = bench.done("hard.late.unacknowledged", m)
    assert (row.processed_status, row.token, row.attempt) == (SUCCESS, 2, 0)
    assert result.get(timeout=PATIENCE) == "in time"
    assert len(bench.starts("hard.late.unacknowledged", m)) == 2
