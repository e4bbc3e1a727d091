"""``on_success`` and ``on_failure`` are called once per message, ``after_return`` once per attempt, however many copies there are."""

from __future__ import annotations

import pytest
from celery import chord

from celery_idempotent.maintenance.recovery import Recovery
from tests.support.apps.handlers import CLASSES
from tests.support.bench import PATIENCE, Bench
from tests.support.waiting import wait_until

every_class = pytest.mark.parametrize("name", CLASSES)


def called(bench: Bench, task: str, m: str) -> list[str]:
    """Return the handlers that have returned for a message, in order."""
    notes = bench.ledger.entries(task=task)
    return [str(note.detail) for note in notes if note.message_id == m and note.event == "end"]


@every_class
@pytest.mark.parametrize(("outcome", "handler"), [("success", "on_success"), ("failure", "on_failure")])
def test_copies_do_not_call_the_handlers_again(bench: Bench, name: str, outcome: str, handler: str) -> None:
    task, m = f"handled.{name}", bench.fresh()

    first = bench.task(task).apply_async((outcome,), message_id=m)
    first.get(timeout=PATIENCE, propagate=False)
    wait_until(lambda: "after_return" in called(bench, task, m), timeout=PATIENCE, describe="after_return")
    bench.done(task, m)
    copies = [bench.deliver(task, (outcome,), message_id=m, task_id=task_id) for task_id in (first.id, None, None)]

    for copy in copies:
        copy.get(timeout=PATIENCE, propagate=False)
    bench.wait_for_row(task, m, lambda row: row.duplicates == 3)
    bench.task("echo").delay().get(timeout=PATIENCE)
    assert called(bench, task, m) == [handler, "after_return"]
    assert len(bench.starts(task, m)) == (2 if outcome == "success" else 1)  # the body, and on_success itself


def test_a_worker_that_is_killed_in_on_success_calls_it_once_more(bench: Bench) -> None:
    task, m = "handled.first", bench.fresh()
    bench.task(task).apply_async(("killed", bench.path("flag")), message_id=m)
    bench.wait_for_starts(task, m, 2)

    def recovered() -> bool:
        Recovery(bench.app.queue_log).run_pass()
        return "after_return" in called(bench, task, m)

    wait_until(recovered, timeout=PATIENCE, describe="the second call of on_success")

    assert called(bench, task, m) == ["on_success", "after_return"]
    assert [start.detail for start in bench.starts(task, m)] == [None, "on_success", "on_success"]
    bench.done(task, m)


def test_a_header_task_that_runs_again_adds_to_its_chord_once(bench: Bench) -> None:
    header = [bench.task("adds").si("a", bench.path("flag"), 3), bench.task("child").si("b")]

    result = chord(header, bench.task("told").s(), app=bench.app).apply_async()

    assert sorted(result.get(timeout=PATIENCE)[0]) == ["a", "a.0", "a.1", "a.2", "b"]
    assert len(bench.ledger.starts("adds")) == 2
    assert len([note for note in bench.ledger.entries(task="child") if str(note.detail).startswith("a.")]) == 3
