"""What Flower shows of a duplicate, of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from celery_idempotent.core.records import Claimed, MessageKey, NewMessage
from tests.integration.flower.conftest import info_of, value_of, wait_for_state
from tests.support.bench import Bench
from tests.support.flower import FlowerProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.xdist_group("flower")


def events(flower: FlowerProcess, bench: Bench, type_: str, task: str) -> float:
    assert bench.worker is not None
    return value_of(flower, f'flower_events_total{{task="{task}",type="{type_}",worker="{bench.worker.hostname}"}}')


def test_a_copy_of_a_finished_message_leaves_it_as_it_is_and_is_counted(flower: FlowerProcess, bench: Bench) -> None:
    message_id = bench.fresh("done")
    result = bench.task("once").apply_async(("k",), message_id=message_id)
    result.get(timeout=30)
    first = wait_for_state(flower, result.id, "SUCCESS")
    before = events(flower, bench, "task-skipped", "once")

    bench.deliver("once", ("k",), message_id=message_id, task_id=result.id)

    wait_until(
        lambda: events(flower, bench, "task-skipped", "once") == before + 1, describe=lambda: info_of(flower, result.id)
    )
    after = info_of(flower, result.id)
    kept = ("state", "result", "runtime", "succeeded")
    assert {name: after[name] for name in kept} == {name: first[name] for name in kept}


def test_a_copy_under_another_id_ends_as_the_first_one_did(flower: FlowerProcess, bench: Bench) -> None:
    good, bad = bench.fresh("good"), bench.fresh("bad")
    bench.task("once").apply_async(("k",), message_id=good).get(timeout=30)
    bench.task("fail").apply_async(("no such card",), message_id=bad).get(timeout=30, propagate=False)

    replayed = bench.deliver("once", ("k",), message_id=good)
    told = bench.deliver("fail", ("no such card",), message_id=bad)

    assert wait_for_state(flower, replayed.id, "SUCCESS")["result"].startswith("'k by ")
    assert "no such card" in wait_for_state(flower, told.id, "FAILURE")["exception"]


def test_a_copy_that_nobody_waits_for_is_skipped(flower: FlowerProcess, bench: Bench) -> None:
    message_id = bench.fresh("quiet")
    bench.task("quiet").apply_async(("k",), message_id=message_id)
    bench.done("quiet", message_id)

    copy = bench.deliver("quiet", ("k",), message_id=message_id)

    wait_for_state(flower, copy.id, "SKIPPED")


def test_a_held_copy_leaves_the_run_as_it_is(flower: FlowerProcess, bench: Bench) -> None:
    message_id, gate = bench.fresh("run"), bench.path("gate")
    result = bench.task("once").apply_async(("k", gate), message_id=message_id)
    wait_for_state(flower, result.id, "STARTED")
    held = events(flower, bench, "task-held", "once")

    bench.deliver("once", ("k", gate), message_id=message_id, task_id=result.id)

    bench.wait_until_held("once", message_id)
    # It came, was held, and came again.
    assert bench.worker is not None
    wait_until(lambda: bench.worker.log.read_text().count(f"once[{message_id}] is held") >= 2)  # type: ignore[union-attr]
    assert info_of(flower, result.id)["state"] == "STARTED"
    assert events(flower, bench, "task-held", "once") == held
    Path(gate).touch()
    assert wait_for_state(flower, result.id, "SUCCESS")["runtime"] is not None


def test_nor_does_one_that_is_dropped_while_it_runs_change_that(flower: FlowerProcess, bench: Bench) -> None:
    message_id, gate = bench.fresh("busy"), bench.path("gate")
    result = bench.task("busy.skip").apply_async((gate,), message_id=message_id)
    wait_for_state(flower, result.id, "STARTED")

    bench.deliver("busy.skip", (gate,), message_id=message_id, task_id=result.id)

    bench.wait_for_row("busy.skip", message_id, lambda row: row.duplicates == 1)
    # The next event of this worker comes behind what it may have sent of the copy.
    after = bench.task("once").apply_async(("after",), message_id=bench.fresh())
    wait_for_state(flower, after.id, "SUCCESS")
    assert info_of(flower, result.id)["state"] == "STARTED"
    Path(gate).touch()
    wait_for_state(flower, result.id, "SUCCESS")


def test_a_held_copy_under_another_id_is_held_and_then_gets_the_result(flower: FlowerProcess, bench: Bench) -> None:
    message_id, gate = bench.fresh("run"), bench.path("gate")
    result = bench.task("once").apply_async(("k", gate), message_id=message_id)
    wait_for_state(flower, result.id, "STARTED")

    copy = bench.deliver("once", ("k", gate), message_id=message_id)

    wait_for_state(flower, copy.id, "HELD")
    assert info_of(flower, result.id)["state"] == "STARTED"
    Path(gate).touch()
    wait_for_state(flower, copy.id, "SUCCESS")
    assert copy.get(timeout=10) == result.get(timeout=10)


def test_a_held_copy_that_takes_over_is_shown_as_running(flower: FlowerProcess, bench: Bench) -> None:
    message_id, gate = bench.fresh("left"), bench.path("gate")
    dead = NewMessage(MessageKey(message_id, "left.rerun"), bench.fresh("task"))
    claimed = bench.app.queue_log.store.claim(dead, worker="dead@there:1", lease=2.0, grace=30.0)
    assert isinstance(claimed, Claimed)

    copy = bench.deliver("left.rerun", (gate,), message_id=message_id)

    wait_for_state(flower, copy.id, "HELD")
    bench.wait_for_starts("left.rerun", message_id)
    wait_for_state(flower, copy.id, "STARTED")
    Path(gate).touch()
    wait_for_state(flower, copy.id, "SUCCESS")
