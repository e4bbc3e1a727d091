"""Mixins of Celery's own in both orders, in a worker with Sentry, OpenTelemetry, django-structlog and celery-progress: guarded once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_idempotent.core.records import ProcessedStatus
from tests.conftest import attach_log
from tests.support.apps.tools import NAMES, VARIABLE
from tests.support.deployment import unique
from tests.support.servers import skip_if_not_installed
from tests.support.shared_workers import SharedWorker, open_shared_worker
from tests.support.waiting import TIMEOUT, wait_until

every_task = pytest.mark.parametrize("task", [f"tools.{name}" for name in NAMES])


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what the tools of the worker saw."""
    return tmp_path_factory.mktemp("tools") / "notes"


@pytest.fixture(scope="module")
def opened(notes: Path) -> Iterator[SharedWorker]:
    with (
        skip_if_not_installed(),
        open_shared_worker(
            notes.parent,
            ["tests.support.apps.tools"],
            settings={"idempotent_recovery_interval": 0},
            environment={VARIABLE: str(notes)},
        ) as shared_worker,
    ):
        yield shared_worker


@pytest.fixture
def shared_worker(request: pytest.FixtureRequest, opened: SharedWorker) -> SharedWorker:
    attach_log(request, "the worker", opened.worker.log_tail)
    return opened


@every_task
def test_a_message_and_its_duplicates_are_one_run(shared_worker: SharedWorker, task: str) -> None:
    m = unique()

    first = shared_worker.task(task).apply_async(message_id=m)
    assert first.get(timeout=TIMEOUT) == ["PROGRESS", False]
    again = shared_worker.task(task).apply_async(message_id=m)
    redelivered = shared_worker.deliver(task, message_id=m, task_id=first.id)
    other = shared_worker.deliver(task, message_id=m)

    assert (again.id, again.duplicate) == (first.id, True)
    assert hasattr(again, "abort") is task.startswith("tools.abortable"), "the class of results is the mixin's"
    assert other.get(timeout=TIMEOUT) == redelivered.get(timeout=TIMEOUT) == ["PROGRESS", False]
    shared_worker.assert_done(task, m, ProcessedStatus.SUCCESS, starts=1, token=1, duplicates=3)


@every_task
def test_a_retry_is_a_second_run_of_one_row(shared_worker: SharedWorker, task: str) -> None:
    m = unique()

    result = shared_worker.task(task).apply_async((shared_worker.path("flag"),), message_id=m)

    # Celery publishes a retry before it stores that state, which may come after the progress that the retry reports.
    assert result.get(timeout=TIMEOUT)[0] in {"PROGRESS", "RETRY"}
    row = shared_worker.wait_until_done(task, m)
    assert (row.processed_status, row.attempt, row.token) == (ProcessedStatus.SUCCESS, 1, 2)
    assert [start.retries for start in shared_worker.starts(task, m)] == [0, 1]


@every_task
def test_each_tool_sees_a_run_once(shared_worker: SharedWorker, notes: Path, task: str) -> None:
    result = shared_worker.task(task).delay()
    result.get(timeout=TIMEOUT)

    expected = sorted(
        [
            f"opentelemetry run/{task} {result.id}",
            f"sentry {task} {result.id}",
            f"structlog task_started {result.id}",
            f"structlog task_succeeded {result.id}",
        ]
    )

    def seen() -> list[str]:
        return sorted(line for line in notes.read_text().splitlines() if line.endswith(result.id))

    wait_until(lambda: len(seen()) >= len(expected), describe=lambda: f"{expected}: {seen()}")
    assert seen() == expected
