"""``on_success`` and ``on_failure`` are called once per message, ``after_return`` once per attempt, however many copies there are."""

from __future__ import annotations

import pytest
from celery import chord

from celery_idempotent.maintenance.recovery import Recovery
from tests.support.apps.handlers import CLASSES
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT, wait_until

every_class = pytest.mark.parametrize("name", CLASSES)


def called(shared_worker: SharedWorker, task: str, m: str) -> list[str]:
    """Return the handlers that have returned for a message, in order."""
    notes = shared_worker.ledger.entries(task=task)
    return [str(note.detail) for note in notes if note.message_id == m and note.event == "end"]


@every_class
@pytest.mark.parametrize(("outcome", "handler"), [("success", "on_success"), ("failure", "on_failure")])
def test_copies_do_not_call_the_handlers_again(
    shared_worker: SharedWorker, name: str, outcome: str, handler: str
) -> None:
    task, m = f"handled.{name}", unique()

    first = shared_worker.task(task).apply_async((outcome,), message_id=m)
    first.get(timeout=TIMEOUT, propagate=False)
    wait_until(lambda: "after_return" in called(shared_worker, task, m), describe="after_return")
    shared_worker.wait_until_done(task, m)
    copies = [
        shared_worker.deliver(task, (outcome,), message_id=m, task_id=task_id) for task_id in (first.id, None, None)
    ]

    for copy in copies:
        copy.get(timeout=TIMEOUT, propagate=False)
    shared_worker.wait_for_row(task, m, lambda row: row.duplicates == 3)
    shared_worker.task("echo").delay().get(timeout=TIMEOUT)
    assert called(shared_worker, task, m) == [handler, "after_return"]
    assert len(shared_worker.starts(task, m)) == (2 if outcome == "success" else 1)  # the body, and on_success itself


def test_a_worker_that_is_killed_in_on_success_calls_it_once_more(shared_worker: SharedWorker) -> None:
    task, m = "handled.first", unique()
    shared_worker.task(task).apply_async(("killed", shared_worker.path("flag")), message_id=m)
    shared_worker.wait_for_starts(task, m, 2)

    def recovered() -> bool:
        Recovery(shared_worker.app.queue_log).run_pass()
        return "after_return" in called(shared_worker, task, m)

    wait_until(recovered, describe="the second call of on_success")

    assert called(shared_worker, task, m) == ["on_success", "after_return"]
    assert [start.detail for start in shared_worker.starts(task, m)] == [None, "on_success", "on_success"]
    shared_worker.wait_until_done(task, m)


def test_a_header_task_that_runs_again_adds_to_its_chord_once(shared_worker: SharedWorker) -> None:
    header = [shared_worker.task("adds").si("a", shared_worker.path("flag"), 3), shared_worker.task("child").si("b")]

    result = chord(header, shared_worker.task("told").s(), app=shared_worker.app).apply_async()

    assert sorted(result.get(timeout=TIMEOUT)[0]) == ["a", "a.0", "a.1", "a.2", "b"]
    assert len(shared_worker.ledger.starts("adds")) == 2
    assert len([note for note in shared_worker.ledger.entries(task="child") if str(note.detail).startswith("a.")]) == 3
