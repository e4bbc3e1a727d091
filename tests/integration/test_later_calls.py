"""A later call under a Celery id that was sent before: a frozen signature, or one with a task id, in a second canvas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group

from celery_idempotent.core.records import Row, RowFilter
from celery_idempotent.maintenance.rescue import Rescue
from tests.integration.test_copies import consumed, purge
from tests.support.bench import PATIENCE, Bench
from tests.support.waiting import wait_until


def frozen(bench: Bench, value: str = "value") -> Any:
    signature = bench.task("echo").si(value)
    signature.freeze()
    return signature


@pytest.mark.parametrize("again", ["at once", "when it is done"])
def test_a_frozen_signature_in_two_chains_goes_on_in_both(bench: Bench, again: str) -> None:
    first, told = frozen(bench), bench.task("told")

    results = [chain(first, told.s("one"), app=bench.app).apply_async()]
    if again == "when it is done":
        assert results[0].get(timeout=PATIENCE) == ["value", "one"]
    results.append(chain(first, told.s("two"), app=bench.app).apply_async())

    assert [result.get(timeout=PATIENCE) for result in results] == [["value", "one"], ["value", "two"]]
    assert len(bench.starts("echo", first.id)) == 1
    wait_until(lambda: not later_rows(bench, "echo"), timeout=PATIENCE, describe="the end of the later call's row")


def test_a_given_task_id_and_a_message_id_in_two_chains_go_on_in_both(bench: Bench) -> None:
    m, told = bench.fresh(), bench.task("told")
    first = bench.task("echo").si("value").set(task_id=bench.fresh("id"), message_id=m)

    results = [chain(first, told.s(n), app=bench.app).apply_async() for n in range(2)]

    assert [result.get(timeout=PATIENCE) for result in results] == [["value", 0], ["value", 1]]
    assert len(bench.starts("echo", m)) == 1


def test_every_step_frozen_in_two_chains_goes_on_in_both(bench: Bench) -> None:
    first, second, told = frozen(bench), bench.task("told").s("second"), bench.task("told")
    second.set(task_id=bench.fresh("id"))

    results = [chain(first, second, told.s(n), app=bench.app).apply_async() for n in range(2)]

    assert [r.get(timeout=PATIENCE) for r in results] == [[["value", "second"], 0], [["value", "second"], 1]]


def test_every_step_frozen_goes_on_in_the_chain_whose_first_step_was_held(bench: Bench) -> None:
    gate, told = bench.path("gate"), bench.task("told")
    first, second = bench.task("gated").si(gate, "value"), told.s("second")
    first.freeze()
    second.set(task_id=bench.fresh("id"))

    results = [chain(first, second, told.s(n), app=bench.app).apply_async() for n in range(2)]
    bench.wait_until_held("gated", first.id)
    Path(gate).touch()

    assert [r.get(timeout=PATIENCE) for r in results] == [[["value", "second"], 0], [["value", "second"], 1]]
    assert len(bench.starts("gated", first.id)) == 1


def test_a_frozen_signature_in_a_header_and_as_a_body_goes_on_in_both(bench: Bench) -> None:
    first, told = frozen(bench), bench.task("told")
    assert chord([first], told.s(), app=bench.app).apply_async().get(timeout=PATIENCE) == [["value"]]

    body = chord([bench.task("add").s(1, 2)], first | told.s("behind"), app=bench.app).apply_async()

    assert body.get(timeout=PATIENCE) == ["value", "behind"]
    assert len(bench.starts("echo", first.id)) == 1


def test_a_failed_signature_in_a_second_chain_tells_its_errback(bench: Bench) -> None:
    first, told = bench.task("fail").si("refused").set(task_id=bench.fresh("id")), bench.task("told")
    with pytest.raises(Exception, match="refused"):
        chain(first, told.s(), app=bench.app).apply_async().get(timeout=PATIENCE)

    flag = bench.fresh("errback")
    second = chain(first, told.s(), app=bench.app)
    second.link_error(told.si().set(message_id=flag))
    second.apply_async()

    bench.wait_for_starts("told", flag)
    assert len(bench.starts("fail", first.id)) == 1


@pytest.mark.parametrize("place", ["a chain's last step", "a link_error", "a group in a chord's body"])
@pytest.mark.parametrize("style", ["message", "call"])
def test_a_failed_signature_without_more_steps_tells_its_errback(bench: Bench, place: str, style: str) -> None:
    """Celery sends an errback of one parameter as a message, and calls one of three where the task failed."""
    first, told = bench.task("fail").si("refused").set(task_id=bench.fresh("id")), bench.task("told")
    with pytest.raises(Exception, match="refused"):
        chain(told.si(), first, app=bench.app).apply_async().get(timeout=PATIENCE)

    errback = bench.task("errback" if style == "message" else "errback.call")
    match place:
        case "a chain's last step":
            chain(told.si(), first, app=bench.app).on_error(errback.s()).apply_async()
        case "a link_error":
            first.clone().on_error(errback.s()).apply_async()
        case "a group in a chord's body":
            body = group(told.si(), first.clone().on_error(errback.s()), app=bench.app)
            chord([told.si()], body, app=bench.app).apply_async()

    bench.wait_for_note(errback.name, first.id)
    assert len(bench.starts("fail", first.id)) == 1
    wait_until(lambda: not later_rows(bench, "fail"), timeout=PATIENCE, describe="the end of the later call's row")


def test_a_later_call_by_name_goes_on(bench: Bench) -> None:
    task_id, told = bench.fresh("id"), bench.task("told")
    assert bench.task("echo").apply_async(("value",), task_id=task_id).get(timeout=PATIENCE) == "value"

    flag = bench.fresh("link")
    bench.app.send_task("echo", ("value",), task_id=task_id, link=told.si().set(message_id=flag))

    bench.wait_for_starts("told", flag)
    assert len(bench.starts("echo", task_id)) == 1


def test_a_later_call_that_the_broker_lost_comes_back(bench: Bench) -> None:
    first, told, queue = frozen(bench), bench.task("told"), bench.fresh("queue")
    assert chain(first, told.s("one"), app=bench.app).apply_async().get(timeout=PATIENCE) == ["value", "one"]

    second = chain(first.clone().set(queue=queue), told.s("two"), app=bench.app).apply_async()
    purge(bench, queue)
    assert len(later_rows(bench, "echo")) == 1
    assert Rescue.of(bench.app.queue_log).publish_waiting(0.0) >= 1
    with consumed(bench, queue):
        assert second.get(timeout=PATIENCE) == ["value", "two"]
        wait_until(lambda: not later_rows(bench, "echo"), timeout=PATIENCE, describe="the end of the later call's row")
    assert len(bench.starts("echo", first.id)) == 1


def later_rows(bench: Bench, task: str) -> list[Row]:
    return list(bench.app.queue_log.store.rows(RowFilter(message_id="again:*", task_name=task)))
