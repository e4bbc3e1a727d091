"""Chains, groups, chords, links and errbacks with a duplicate in each position: the canvas goes on, the body ran once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError

from celery_idempotent import AlreadyFailedError, MessageMismatchError
from celery_idempotent.core.records import ProcessedStatus, Status
from tests.support.bench import PATIENCE, Bench

#: Makes a canvas with one identified message in it.
Canvas = Callable[[Bench, str], Any]


def in_chain(position: int) -> Canvas:
    def make(bench: Bench, m: str) -> Any:
        add = bench.task("add")
        steps = [add.s(1, 1), add.s(2), add.s(3)]
        steps[position] = steps[position].set(message_id=m)
        return chain(*steps, app=bench.app)

    return make


def in_group(bench: Bench, m: str) -> Any:
    add = bench.task("add")
    return group([add.s(1, 2), add.s(3, 4).set(message_id=m)], app=bench.app)


def in_header(bench: Bench, m: str) -> Any:
    return chord(in_group(bench, m), bench.task("told").s(), app=bench.app)


def in_body(bench: Bench, m: str) -> Any:
    add = bench.task("add")
    return chord([add.s(1, 2), add.s(3, 4)], bench.task("told").s().set(message_id=m), app=bench.app)


def in_inner_group(bench: Bench, m: str) -> Any:
    add = bench.task("add")
    inner = group([add.s(1), add.s(2).set(message_id=m)], app=bench.app)
    return chain(add.s(1, 1), inner, bench.task("told").s(), app=bench.app)


def behind_chord(bench: Bench, m: str) -> Any:
    add, told = bench.task("add"), bench.task("told")
    return chain(group([add.s(1, 2), add.s(3, 4)]), told.s(), told.s().set(message_id=m), app=bench.app)


CANVASES: dict[str, tuple[Canvas, str, Any]] = {
    "first of a chain": (in_chain(0), "add", 7),
    "middle of a chain": (in_chain(1), "add", 7),
    "last of a chain": (in_chain(2), "add", 7),
    "member of a group": (in_group, "add", [3, 7]),
    "member of a header": (in_header, "add", [[3, 7]]),
    "body of a chord": (in_body, "told", [[3, 7]]),
    "member of a group in a chain": (in_inner_group, "add", [[3, 4]]),
    "behind a chord": (behind_chord, "told", [[[3, 7]]]),
}


@pytest.mark.parametrize(("canvas", "task", "value"), CANVASES.values(), ids=CANVASES)
def test_a_duplicate_is_replayed_and_the_canvas_goes_on(bench: Bench, canvas: Canvas, task: str, value: Any) -> None:
    m = bench.fresh()

    results = [canvas(bench, m).apply_async() for _ in range(3)]

    assert [result.get(timeout=PATIENCE) for result in results] == [value] * 3
    assert len({result.id for result in results}) == 3
    row = bench.wait_for_row(task, m, lambda row: row.duplicates >= 2)
    assert (row.status, row.processed_status, row.token) == (Status.DONE, ProcessedStatus.SUCCESS, 1)
    assert len(bench.starts(task, m)) == 1


def test_every_member_of_a_canvas_resolves(bench: Bench) -> None:
    m = bench.fresh()
    in_chain(1)(bench, m).apply_async().get(timeout=PATIENCE)

    last = in_chain(1)(bench, m).apply_async()

    assert last.get(timeout=PATIENCE) == 7
    assert (last.parent.get(timeout=PATIENCE), last.parent.parent.get(timeout=PATIENCE)) == (4, 2)


def test_two_members_of_one_chord_with_one_id_are_one_run(bench: Bench) -> None:
    m, told = bench.fresh(), bench.task("told")
    member = told.s("here").set(message_id=m)

    result = chord([member, member.clone()], told.s(), app=bench.app).apply_async()

    assert result.get(timeout=PATIENCE) == [[["here"], ["here"]]]
    assert len(bench.starts("told", m)) == 1


@pytest.mark.parametrize("position", ["middle of a chain", "member of a header"])
def test_a_duplicate_of_a_running_message_is_held_with_its_canvas(bench: Bench, position: str) -> None:
    m, gate, told = bench.fresh(), bench.path("gate"), bench.task("told")
    busy = bench.task("busy.hold")
    bench.deliver("busy.hold", (gate, "value"), message_id=m)
    bench.wait_for_starts("busy.hold", m)

    same = busy.si(gate, "value").set(message_id=m)
    if position == "middle of a chain":
        canvas = chain(told.si("first"), same, told.s("behind"), app=bench.app)
    else:
        canvas = chord([told.si("beside"), same], told.s(), app=bench.app)
    result = canvas.apply_async()
    wait_until_beside = result.parent if position == "member of a header" else result.parent.parent
    if position == "middle of a chain":
        assert wait_until_beside.get(timeout=PATIENCE) == ["first"]
    Path(gate).touch()

    expected = ["value", "behind"] if position == "middle of a chain" else [[["beside"], "value"]]
    assert result.get(timeout=PATIENCE) == expected
    assert len(bench.starts("busy.hold", m)) == 1


def test_a_task_that_raises_on_duplicates_does_not_stop_a_canvas(bench: Bench) -> None:
    order = bench.fresh("order")
    value = {"order": order, "amount": 1}

    results = [
        chain(bench.task("add").si(1, 2), bench.task("order.raise").si(order), app=bench.app).apply_async()
        for _ in range(2)
    ]

    assert [result.get(timeout=PATIENCE) for result in results] == [value, value]
    assert len(bench.starts("order.raise", f"order:{order}")) == 1


def test_retries_in_a_chain_go_on_to_the_next_step(bench: Bench) -> None:
    m = bench.fresh()

    results = [
        chain(bench.task("retry_n").s(2, 0).set(message_id=m), bench.task("add").s(10), app=bench.app).apply_async()
        for _ in range(2)
    ]

    # The second was held while the first one's retries ran, or replays it.
    assert [result.get(timeout=PATIENCE) for result in results] == [12, 12]
    assert len(bench.starts("retry_n", m)) == 3


@pytest.mark.parametrize(("kind", "value"), [("guarded", 13), ("plain", 13), ("chain", 16)])
def test_a_replaced_step_goes_on_to_the_next(bench: Bench, kind: str, value: int) -> None:
    m = bench.fresh()

    result = chain(
        bench.task("replace_by").s(kind).set(message_id=m), bench.task("add").s(10), app=bench.app
    ).apply_async()

    assert result.get(timeout=PATIENCE) == value
    assert len(bench.starts("replace_by", m)) == 1


# -- failures ---------------------------------------------------------------------------------------------------------------


def test_a_failed_duplicate_fails_its_chain(bench: Bench) -> None:
    m = bench.fresh()

    def canvas() -> Any:
        fail = bench.task("fail").si("the reason").set(message_id=m)
        return chain(bench.task("add").s(1, 2), fail, bench.task("echo").s(), app=bench.app)

    chains = canvas().apply_async(), canvas().apply_async()

    # Whichever chain's first step ended first ran the failing one; the other was told.
    errors = [chain.parent.get(timeout=PATIENCE, propagate=False) for chain in chains]
    ran, told = sorted(errors, key=lambda error: isinstance(error, AlreadyFailedError))
    assert isinstance(ran, ValueError)
    assert str(ran) == "the reason"
    assert isinstance(told, AlreadyFailedError)
    assert "ValueError: the reason" in str(told)
    assert len(bench.starts("fail", m)) == 1


def test_a_failed_duplicate_fails_its_chord(bench: Bench) -> None:
    m = bench.fresh()

    def canvas() -> Any:
        members = [bench.task("add").s(1, 2), bench.task("fail").s("the reason").set(message_id=m)]
        return chord(members, bench.task("told").s(), app=bench.app)

    first, second = canvas().apply_async(), canvas().apply_async()

    errors = [result.get(timeout=PATIENCE, propagate=False) for result in (first, second)]
    assert [type(error) for error in errors] == [ChordError, ChordError]
    assert ["ValueError" in str(error) for error in errors] == [True, True]
    assert ["AlreadyFailedError" in str(error) for error in errors].count(True) == 1  # whichever came second
    assert len(bench.starts("fail", m)) == 1


def test_other_arguments_inside_of_a_canvas_fail_that_step_alone(bench: Bench) -> None:
    """Whoever dispatches the step has run well, so it is the step that learns of the mismatch."""
    m = bench.fresh()
    assert bench.task("echo").apply_async((1,), message_id=m).get(timeout=PATIENCE) == 1

    result = chain(bench.task("add").s(1, 1), bench.task("echo").s().set(message_id=m), app=bench.app).apply_async()

    with pytest.raises(MessageMismatchError):
        result.get(timeout=PATIENCE)
    assert result.parent.get(timeout=PATIENCE) == 2
    parent = bench.done("add", result.parent.id)
    assert parent.processed_status is ProcessedStatus.SUCCESS
    assert len(bench.starts("echo", m)) == 1


def test_other_arguments_of_a_chords_body_fail_the_body_alone(bench: Bench) -> None:
    m, add, told = bench.fresh(), bench.task("add"), bench.task("told")
    assert told.apply_async((1,), message_id=m).get(timeout=PATIENCE) == [1]

    result = chord([add.s(1, 2), add.s(3, 4)], told.s().set(message_id=m), app=bench.app).apply_async()

    with pytest.raises(MessageMismatchError):
        result.get(timeout=PATIENCE)
    assert result.parent.get(timeout=PATIENCE) == [3, 7]
    assert len(bench.starts("told", m)) == 1


# -- links ------------------------------------------------------------------------------------------------------------------


def test_a_link_is_sent_for_each_caller(bench: Bench) -> None:
    """The callback of a duplicate is the duplicate's own: it gets the value that the first run made."""
    m, told = bench.fresh(), bench.task("told")

    first = bench.task("echo").apply_async(("value",), message_id=m, link=told.s("first"))
    second = bench.task("echo").apply_async(("value",), message_id=m, link=told.s("second"))

    assert (first.get(timeout=PATIENCE), second.get(timeout=PATIENCE)) == ("value", "value")
    assert first.children[0].get(timeout=PATIENCE) == ["value", "first"]
    assert second.children[0].get(timeout=PATIENCE) == ["value", "second"]
    assert (len(bench.starts("echo", m)), second.id != first.id) == (1, True)


def test_a_link_with_an_id_runs_once(bench: Bench) -> None:
    m, told, echo = bench.fresh(), bench.task("told"), bench.task("echo")

    results = [echo.apply_async(("value",), link=told.s().set(message_id=m)) for _ in range(2)]

    assert [result.get(timeout=PATIENCE) for result in results] == ["value", "value"]
    assert [result.children[0].get(timeout=PATIENCE) for result in results] == [["value"]] * 2
    assert len(bench.starts("told", m)) == 1


def test_a_copy_of_a_finished_message_does_not_send_its_link_again(bench: Bench) -> None:
    m, told = bench.fresh(), bench.task("told")
    heard = bench.fresh("heard")
    result = bench.task("echo").apply_async(("value",), message_id=m, link=told.s().set(message_id=heard))
    assert result.get(timeout=PATIENCE) == "value"
    bench.done("told", heard)
    bench.done("echo", m)

    bench.deliver("echo", ("value",), message_id=m, task_id=result.id, link=told.s().set(message_id=heard))

    bench.wait_for_row("echo", m, lambda row: row.duplicates == 1)
    # One that is sent behind it comes after whatever it might have sent.
    bench.task("told").apply_async(("behind",), message_id=f"{heard}:behind")
    bench.done("told", f"{heard}:behind")
    assert bench.row("told", heard).duplicates == 0
    assert len(bench.starts("told", heard)) == 1


@pytest.mark.parametrize("style", ["message", "call"])
def test_an_errback_is_told_of_a_failed_duplicate(bench: Bench, style: str) -> None:
    """Celery sends an errback of one parameter as a message, and calls one of three where the task failed."""
    m = bench.fresh()
    fail, errback = bench.task("fail"), bench.task("errback" if style == "message" else "errback.call")

    results = [fail.apply_async(message_id=m, link_error=errback.s()) for _ in range(2)]

    errors = [result.get(timeout=PATIENCE, propagate=False) for result in results]
    assert {type(error).__name__ for error in errors} == {"ValueError", "AlreadyFailedError"}
    for result in results:
        bench.wait_for_note(errback.name, result.id)
    assert len(bench.starts("fail", m)) == 1


def test_a_link_that_raises_on_duplicates_does_not_fail_its_parent(bench: Bench) -> None:
    order, echo, link = bench.fresh("order"), bench.task("echo"), bench.task("order.raise")

    results = [echo.apply_async(("value",), link=link.si(order)) for _ in range(2)]

    assert [result.get(timeout=PATIENCE) for result in results] == ["value", "value"]
    row = bench.wait_for_row("order.raise", f"order:{order}", lambda row: row.duplicates == 1)
    assert row.processed_status is ProcessedStatus.SUCCESS
    assert len(bench.starts("order.raise", f"order:{order}")) == 1


def test_a_link_with_other_arguments_does_not_fail_its_parent(bench: Bench) -> None:
    m, echo, told = bench.fresh(), bench.task("echo"), bench.task("told")

    results = [echo.apply_async((value,), link=told.s().set(message_id=m)) for value in ("one", "two")]

    assert [result.get(timeout=PATIENCE) for result in results] == ["one", "two"]
    links = [result.children[0] for result in results]
    assert sorted(type(link.get(timeout=PATIENCE, propagate=False)).__name__ for link in links) == [
        "MessageMismatchError",
        "list",
    ]
    assert len(bench.starts("told", m)) == 1


def test_an_errback_with_an_id_runs_once(bench: Bench) -> None:
    m, fail, told = bench.fresh(), bench.task("fail"), bench.task("told")

    results = [fail.apply_async(link_error=told.si("it failed").set(message_id=m)) for _ in range(2)]

    for result in results:
        with pytest.raises(ValueError, match="as told"):
            result.get(timeout=PATIENCE)
    row = bench.wait_for_row("told", m, lambda row: row.duplicates == 1)
    assert row.processed_status is ProcessedStatus.SUCCESS
    assert len(bench.starts("told", m)) == 1
