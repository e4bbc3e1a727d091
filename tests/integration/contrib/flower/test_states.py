"""What Flower shows of a duplicate, of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from celery_idempotent.core.records import Claimed, MessageKey, NewMessage
from tests.integration.contrib.flower.conftest import info_of, value_of, wait_for_state
from tests.support.deployment import unique
from tests.support.flower import FlowerProcess
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import wait_until

pytestmark = pytest.mark.xdist_group("flower")


def events(flower: FlowerProcess, shared_worker: SharedWorker, type_: str, task: str) -> float:
    return value_of(
        flower, f'flower_events_total{{task="{task}",type="{type_}",worker="{shared_worker.worker.hostname}"}}'
    )


def test_a_copy_of_a_finished_message_is_only_counted(flower: FlowerProcess, shared_worker: SharedWorker) -> None:
    message_id = unique("done")
    result = shared_worker.task("once").apply_async(("k",), message_id=message_id)
    result.get(timeout=30)
    first = wait_for_state(flower, result.id, "SUCCESS")
    before = events(flower, shared_worker, "task-skipped", "once")

    shared_worker.deliver("once", ("k",), message_id=message_id, task_id=result.id)

    wait_until(
        lambda: events(flower, shared_worker, "task-skipped", "once") == before + 1,
        describe=lambda: info_of(flower, result.id),
    )
    after = info_of(flower, result.id)
    kept = ("state", "result", "runtime", "succeeded")
    assert {name: after[name] for name in kept} == {name: first[name] for name in kept}


def test_a_copy_under_another_id_ends_as_the_first_one_did(flower: FlowerProcess, shared_worker: SharedWorker) -> None:
    good, bad = unique("good"), unique("bad")
    shared_worker.task("once").apply_async(("k",), message_id=good).get(timeout=30)
    shared_worker.task("fail").apply_async(("no such card",), message_id=bad).get(timeout=30, propagate=False)

    replayed = shared_worker.deliver("once", ("k",), message_id=good)
    told = shared_worker.deliver("fail", ("no such card",), message_id=bad)

    assert wait_for_state(flower, replayed.id, "SUCCESS")["result"].startswith("'k by ")
    assert "no such card" in wait_for_state(flower, told.id, "FAILURE")["exception"]


def test_a_copy_without_a_waiting_caller_is_skipped(flower: FlowerProcess, shared_worker: SharedWorker) -> None:
    message_id = unique("quiet")
    shared_worker.task("quiet").apply_async(("k",), message_id=message_id)
    shared_worker.wait_until_done("quiet", message_id)

    copy = shared_worker.deliver("quiet", ("k",), message_id=message_id)

    wait_for_state(flower, copy.id, "SKIPPED")


def test_a_held_copy_leaves_the_run_as_it_is(flower: FlowerProcess, shared_worker: SharedWorker) -> None:
    message_id, gate = unique("run"), shared_worker.path("gate")
    result = shared_worker.task("once").apply_async(("k", gate), message_id=message_id)
    wait_for_state(flower, result.id, "STARTED")
    held = events(flower, shared_worker, "task-held", "once")

    shared_worker.deliver("once", ("k", gate), message_id=message_id, task_id=result.id)

    shared_worker.wait_until_held("once", message_id)
    # It came, was held, and came again.
    wait_until(lambda: shared_worker.worker.log.read_text().count(f"once[{message_id}] is held") >= 2)
    assert info_of(flower, result.id)["state"] == "STARTED"
    assert events(flower, shared_worker, "task-held", "once") == held
    Path(gate).touch()
    assert wait_for_state(flower, result.id, "SUCCESS")["runtime"] is not None


def test_nor_does_one_that_is_dropped_while_it_runs_change_that(
    flower: FlowerProcess, shared_worker: SharedWorker
) -> None:
    message_id, gate = unique("busy"), shared_worker.path("gate")
    result = shared_worker.task("busy.skip").apply_async((gate,), message_id=message_id)
    wait_for_state(flower, result.id, "STARTED")

    shared_worker.deliver("busy.skip", (gate,), message_id=message_id, task_id=result.id)

    shared_worker.wait_for_row("busy.skip", message_id, lambda row: row.duplicates == 1)
    # This worker's next event follows any that it sent for the copy.
    after = shared_worker.task("once").apply_async(("after",), message_id=unique())
    wait_for_state(flower, after.id, "SUCCESS")
    assert info_of(flower, result.id)["state"] == "STARTED"
    Path(gate).touch()
    wait_for_state(flower, result.id, "SUCCESS")


def test_a_held_copy_under_another_id_gets_the_result(flower: FlowerProcess, shared_worker: SharedWorker) -> None:
    message_id, gate = unique("run"), shared_worker.path("gate")
    result = shared_worker.task("once").apply_async(("k", gate), message_id=message_id)
    wait_for_state(flower, result.id, "STARTED")

    copy = shared_worker.deliver("once", ("k", gate), message_id=message_id)

    wait_for_state(flower, copy.id, "HELD")
    assert info_of(flower, result.id)["state"] == "STARTED"
    Path(gate).touch()
    wait_for_state(flower, copy.id, "SUCCESS")
    assert copy.get(timeout=10) == result.get(timeout=10)


def test_a_held_copy_that_takes_over_is_shown_as_running(flower: FlowerProcess, shared_worker: SharedWorker) -> None:
    message_id, gate = unique("left"), shared_worker.path("gate")
    dead = NewMessage(MessageKey(message_id, "left.rerun"), unique("task"))
    claimed = shared_worker.app.queue_log.store.claim(dead, worker="dead@there:1", lease=2.0, grace=30.0)
    assert isinstance(claimed, Claimed)

    copy = shared_worker.deliver("left.rerun", (gate,), message_id=message_id)

    wait_for_state(flower, copy.id, "HELD")
    shared_worker.wait_for_starts("left.rerun", message_id)
    wait_for_state(flower, copy.id, "STARTED")
    Path(gate).touch()
    wait_for_state(flower, copy.id, "SUCCESS")
