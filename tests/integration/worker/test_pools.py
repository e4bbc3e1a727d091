"""What Celery says from outside of a body, in pools that run it in the worker's own process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from celery import states
from celery.exceptions import TaskRevokedError, TimeLimitExceeded

from celery_idempotent.core.records import ProcessedStatus
from tests.conftest import StartWorker
from tests.support.apps import AppSpec
from tests.support.deployment import unique
from tests.support.servers import skip_if_not_installed
from tests.support.shared_workers import SharedWorker, open_shared_worker
from tests.support.versions import CELERY
from tests.support.waiting import TIMEOUT, wait_until

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE


@pytest.fixture(scope="module")
def gevent_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedWorker]:
    """Yield a worker that runs its bodies in greenlets, with leases that would run out within the tests."""
    tasks = ("tests.support.apps.generic", "tests.support.apps.outcomes")
    with (
        skip_if_not_installed(),
        open_shared_worker(
            Path(tmp_path_factory.mktemp("gevent")),
            tasks,
            settings={"idempotent_lease": 2, "idempotent_recovery_interval": 1},
            pool="gevent",
        ) as shared_worker,
    ):
        yield shared_worker


@pytest.mark.parametrize("task", ["hard.early", "hard.late"])
def test_a_greenlet_at_its_time_limit_ends_as_failure(gevent_worker: SharedWorker, task: str) -> None:
    shared_worker = gevent_worker
    m = unique()

    result = shared_worker.task(task).apply_async((shared_worker.path("flag"),), message_id=m)

    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), TimeLimitExceeded)
    row = shared_worker.wait_until_done(task, m)
    assert (row.processed_status, row.token, row.lease_expires_at) == (FAILURE, 1, None)
    assert "TimeLimitExceeded" in str(row.error)
    assert len(shared_worker.starts(task, m)) == 1


@pytest.mark.skipif(CELERY < (5, 7), reason="before 5.7 Celery keeps the message until the worker ends")
def test_a_greenlet_at_its_time_limit_gives_an_unacknowledged_message_back(gevent_worker: SharedWorker) -> None:
    shared_worker = gevent_worker
    m = unique()

    result = shared_worker.task("hard.late.unacknowledged").apply_async((shared_worker.path("flag"),), message_id=m)

    row = shared_worker.wait_until_done("hard.late.unacknowledged", m)
    assert (row.processed_status, row.token, row.attempt) == (SUCCESS, 2, 0)
    wait_until(
        lambda: shared_worker.app.AsyncResult(result.id).state == states.SUCCESS,
        describe="the result of the second run",
    )
    assert len(shared_worker.starts("hard.late.unacknowledged", m)) == 2


def test_a_greenlet_that_is_terminated_ends_as_failure(gevent_worker: SharedWorker) -> None:
    shared_worker = gevent_worker
    m = unique()
    result = shared_worker.task("gated").apply_async((shared_worker.path("gate"),), message_id=m)
    shared_worker.wait_for_starts("gated", m)

    wait_until(
        lambda: shared_worker.app.control.revoke(result.id, terminate=True, reply=True, timeout=TIMEOUT, limit=1),
        describe="the worker's answer to a revoke",
    )

    with pytest.raises(TaskRevokedError):
        result.get(timeout=TIMEOUT)
    row = shared_worker.wait_until_done("gated", m)
    assert (row.processed_status, row.error) == (FAILURE, "revoked: it was terminated while it ran")
    assert (row.token, row.lease_expires_at) == (1, None)
    assert shared_worker.ledger.ends(task_id=result.id) == []


@pytest.mark.parametrize("broker", ["redis"], indirect=True)
@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_eventlet_is_refused_by_name(spec: AppSpec, start_worker: StartWorker) -> None:
    worker = start_worker(replace(spec, tasks=("tests.support.apps.generic",)), pool="eventlet", wait=False)

    wait_until(lambda: not worker.is_alive, describe="the end of the worker")
    assert worker.exit_status != 0
    assert "the worker does not start: celery-idempotent does not run in the eventlet pool" in worker.log_tail()
    assert "--pool=gevent or --pool=threads" in worker.log_tail()
