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
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT

#: Makes a canvas with one identified message in it.
Canvas = Callable[[SharedWorker, str], Any]


def in_chain(position: int) -> Canvas:
    def make(shared_worker: SharedWorker, m: str) -> Any:
        add = shared_worker.task("add")
        steps = [add.s(1, 1), add.s(2), add.s(3)]
        steps[position] = steps[position].set(message_id=m)
        return chain(*steps, app=shared_worker.app)

    return make


def in_group(shared_worker: SharedWorker, m: str) -> Any:
    add = shared_worker.task("add")
    return group([add.s(1, 2), add.s(3, 4).set(message_id=m)], app=shared_worker.app)


def in_header(shared_worker: SharedWorker, m: str) -> Any:
    return chord(in_group(shared_worker, m), shared_worker.task("told").s(), app=shared_worker.app)


def in_body(shared_worker: SharedWorker, m: str) -> Any:
    add = shared_worker.task("add")
    return chord([add.s(1, 2), add.s(3, 4)], shared_worker.task("told").s().set(message_id=m), app=shared_worker.app)


def in_inner_group(shared_worker: SharedWorker, m: str) -> Any:
    add = shared_worker.task("add")
    inner = group([add.s(1), add.s(2).set(message_id=m)], app=shared_worker.app)
    return chain(add.s(1, 1), inner, shared_worker.task("told").s(), app=shared_worker.app)


def behind_chord(shared_worker: SharedWorker, m: str) -> Any:
    add, told = shared_worker.task("add"), shared_worker.task("told")
    return chain(group([add.s(1, 2), add.s(3, 4)]), told.s(), told.s().set(message_id=m), app=shared_worker.app)


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
def test_a_duplicate_is_replayed_and_the_canvas_goes_on(
    shared_worker: SharedWorker, canvas: Canvas, task: str, value: Any
) -> None:
    m = unique()

    results = [canvas(shared_worker, m).apply_async() for _ in range(3)]

    assert [result.get(timeout=TIMEOUT) for result in results] == [value] * 3
    assert len({result.id for result in results}) == 3
    row = shared_worker.wait_for_row(task, m, lambda row: row.duplicates >= 2)
    assert (row.status, row.processed_status, row.token) == (Status.DONE, ProcessedStatus.SUCCESS, 1)
    assert len(shared_worker.starts(task, m)) == 1


def test_every_member_of_a_canvas_resolves(shared_worker: SharedWorker) -> None:
    m = unique()
    in_chain(1)(shared_worker, m).apply_async().get(timeout=TIMEOUT)

    last = in_chain(1)(shared_worker, m).apply_async()

    assert last.get(timeout=TIMEOUT) == 7
    assert (last.parent.get(timeout=TIMEOUT), last.parent.parent.get(timeout=TIMEOUT)) == (4, 2)


def test_two_members_of_one_chord_with_one_id_are_one_run(shared_worker: SharedWorker) -> None:
    m, told = unique(), shared_worker.task("told")
    member = told.s("here").set(message_id=m)

    result = chord([member, member.clone()], told.s(), app=shared_worker.app).apply_async()

    assert result.get(timeout=TIMEOUT) == [[["here"], ["here"]]]
    assert len(shared_worker.starts("told", m)) == 1


@pytest.mark.parametrize("position", ["middle of a chain", "member of a header"])
def test_a_duplicate_of_a_running_message_is_held_with_its_canvas(shared_worker: SharedWorker, position: str) -> None:
    m, gate, told = unique(), shared_worker.path("gate"), shared_worker.task("told")
    busy = shared_worker.task("busy.hold")
    shared_worker.deliver("busy.hold", (gate, "value"), message_id=m)
    shared_worker.wait_for_starts("busy.hold", m)

    same = busy.si(gate, "value").set(message_id=m)
    if position == "middle of a chain":
        canvas = chain(told.si("first"), same, told.s("behind"), app=shared_worker.app)
    else:
        canvas = chord([told.si("beside"), same], told.s(), app=shared_worker.app)
    result = canvas.apply_async()
    wait_until_beside = result.parent if position == "member of a header" else result.parent.parent
    if position == "middle of a chain":
        assert wait_until_beside.get(timeout=TIMEOUT) == ["first"]
    Path(gate).touch()

    expected = ["value", "behind"] if position == "middle of a chain" else [[["beside"], "value"]]
    assert result.get(timeout=TIMEOUT) == expected
    assert len(shared_worker.starts("busy.hold", m)) == 1


def test_a_task_that_raises_on_duplicates_does_not_stop_a_canvas(shared_worker: SharedWorker) -> None:
    order = unique("order")
    value = {"order": order, "amount": 1}

    results = [
        chain(
            shared_worker.task("add").si(1, 2), shared_worker.task("order.raise").si(order), app=shared_worker.app
        ).apply_async()
        for _ in range(2)
    ]

    assert [result.get(timeout=TIMEOUT) for result in results] == [value, value]
    assert len(shared_worker.starts("order.raise", f"order:{order}")) == 1


def test_retries_in_a_chain_go_on_to_the_next_step(shared_worker: SharedWorker) -> None:
    m = unique()

    results = [
        chain(
            shared_worker.task("retry_n").s(2, 0).set(message_id=m),
            shared_worker.task("add").s(10),
            app=shared_worker.app,
        ).apply_async()
        for _ in range(2)
    ]

    # The second was held while the first one's retries ran, or replays it.
    assert [result.get(timeout=TIMEOUT) for result in results] == [12, 12]
    assert len(shared_worker.starts("retry_n", m)) == 3


@pytest.mark.parametrize(("kind", "value"), [("guarded", 13), ("plain", 13), ("chain", 16)])
def test_a_replaced_step_goes_on_to_the_next(shared_worker: SharedWorker, kind: str, value: int) -> None:
    m = unique()

    result = chain(
        shared_worker.task("replace_by").s(kind).set(message_id=m),
        shared_worker.task("add").s(10),
        app=shared_worker.app,
    ).apply_async()

    assert result.get(timeout=TIMEOUT) == value
    assert len(shared_worker.starts("replace_by", m)) == 1


# -- failures ---------------------------------------------------------------------------------------------------------------


def test_a_failed_duplicate_fails_its_chain(shared_worker: SharedWorker) -> None:
    m = unique()

    def canvas() -> Any:
        fail = shared_worker.task("fail").si("the reason").set(message_id=m)
        return chain(shared_worker.task("add").s(1, 2), fail, shared_worker.task("echo").s(), app=shared_worker.app)

    chains = canvas().apply_async(), canvas().apply_async()

    # The chain whose first step ended first ran the failing one; the other got its error.
    errors = [chain.parent.get(timeout=TIMEOUT, propagate=False) for chain in chains]
    ran, told = sorted(errors, key=lambda error: isinstance(error, AlreadyFailedError))
    assert isinstance(ran, ValueError)
    assert str(ran) == "the reason"
    assert isinstance(told, AlreadyFailedError)
    assert "ValueError: the reason" in str(told)
    assert len(shared_worker.starts("fail", m)) == 1


def test_a_failed_duplicate_fails_its_chord(shared_worker: SharedWorker) -> None:
    m = unique()

    def canvas() -> Any:
        members = [shared_worker.task("add").s(1, 2), shared_worker.task("fail").s("the reason").set(message_id=m)]
        return chord(members, shared_worker.task("told").s(), app=shared_worker.app)

    first, second = canvas().apply_async(), canvas().apply_async()

    errors = [result.get(timeout=TIMEOUT, propagate=False) for result in (first, second)]
    assert [type(error) for error in errors] == [ChordError, ChordError]
    assert ["ValueError" in str(error) for error in errors] == [True, True]
    assert ["AlreadyFailedError" in str(error) for error in errors].count(True) == 1  # whichever came second
    assert len(shared_worker.starts("fail", m)) == 1


def test_other_arguments_inside_of_a_canvas_fail_that_step_alone(shared_worker: SharedWorker) -> None:
    """Whoever dispatches the step has run well, so it is the step that learns of the mismatch."""
    m = unique()
    assert shared_worker.task("echo").apply_async((1,), message_id=m).get(timeout=TIMEOUT) == 1

    result = chain(
        shared_worker.task("add").s(1, 1), shared_worker.task("echo").s().set(message_id=m), app=shared_worker.app
    ).apply_async()

    with pytest.raises(MessageMismatchError):
        result.get(timeout=TIMEOUT)
    assert result.parent.get(timeout=TIMEOUT) == 2
    parent = shared_worker.wait_until_done("add", result.parent.id)
    assert parent.processed_status is ProcessedStatus.SUCCESS
    assert len(shared_worker.starts("echo", m)) == 1


def test_other_arguments_of_a_chords_body_fail_the_body_alone(shared_worker: SharedWorker) -> None:
    m, add, told = unique(), shared_worker.task("add"), shared_worker.task("told")
    assert told.apply_async((1,), message_id=m).get(timeout=TIMEOUT) == [1]

    result = chord([add.s(1, 2), add.s(3, 4)], told.s().set(message_id=m), app=shared_worker.app).apply_async()

    with pytest.raises(MessageMismatchError):
        result.get(timeout=TIMEOUT)
    assert result.parent.get(timeout=TIMEOUT) == [3, 7]
    assert len(shared_worker.starts("told", m)) == 1


# -- links ------------------------------------------------------------------------------------------------------------------


def test_a_link_is_sent_for_each_caller(shared_worker: SharedWorker) -> None:
    """The callback of a duplicate is the duplicate's own: it gets the value that the first run made."""
    m, told = unique(), shared_worker.task("told")

    first = shared_worker.task("echo").apply_async(("value",), message_id=m, link=told.s("first"))
    second = shared_worker.task("echo").apply_async(("value",), message_id=m, link=told.s("second"))

    assert (first.get(timeout=TIMEOUT), second.get(timeout=TIMEOUT)) == ("value", "value")
    assert first.children[0].get(timeout=TIMEOUT) == ["value", "first"]
    assert second.children[0].get(timeout=TIMEOUT) == ["value", "second"]
    assert (len(shared_worker.starts("echo", m)), second.id != first.id) == (1, True)


def test_a_link_with_an_id_runs_once(shared_worker: SharedWorker) -> None:
    m, told, echo = unique(), shared_worker.task("told"), shared_worker.task("echo")

    results = [echo.apply_async(("value",), link=told.s().set(message_id=m)) for _ in range(2)]

    assert [result.get(timeout=TIMEOUT) for result in results] == ["value", "value"]
    assert [result.children[0].get(timeout=TIMEOUT) for result in results] == [["value"]] * 2
    assert len(shared_worker.starts("told", m)) == 1


def test_a_copy_of_a_finished_message_does_not_send_its_link_again(shared_worker: SharedWorker) -> None:
    m, told = unique(), shared_worker.task("told")
    heard = unique("heard")
    result = shared_worker.task("echo").apply_async(("value",), message_id=m, link=told.s().set(message_id=heard))
    assert result.get(timeout=TIMEOUT) == "value"
    shared_worker.wait_until_done("told", heard)
    shared_worker.wait_until_done("echo", m)

    shared_worker.deliver("echo", ("value",), message_id=m, task_id=result.id, link=told.s().set(message_id=heard))

    shared_worker.wait_for_row("echo", m, lambda row: row.duplicates == 1)
    # A later message comes after anything that it might have sent.
    shared_worker.task("told").apply_async(("behind",), message_id=f"{heard}:behind")
    shared_worker.wait_until_done("told", f"{heard}:behind")
    assert shared_worker.row("told", heard).duplicates == 0
    assert len(shared_worker.starts("told", heard)) == 1


@pytest.mark.parametrize("style", ["message", "call"])
def test_an_errback_is_called_for_a_failed_duplicate(shared_worker: SharedWorker, style: str) -> None:
    """Celery sends an errback of one parameter as a message, and calls one of three where the task failed."""
    m = unique()
    fail, errback = shared_worker.task("fail"), shared_worker.task("errback" if style == "message" else "errback.call")

    results = [fail.apply_async(message_id=m, link_error=errback.s()) for _ in range(2)]

    errors = [result.get(timeout=TIMEOUT, propagate=False) for result in results]
    assert {type(error).__name__ for error in errors} == {"ValueError", "AlreadyFailedError"}
    for result in results:
        shared_worker.wait_for_note(errback.name, result.id)
    assert len(shared_worker.starts("fail", m)) == 1


def test_a_link_that_raises_on_duplicates_does_not_fail_its_parent(shared_worker: SharedWorker) -> None:
    order, echo, link = unique("order"), shared_worker.task("echo"), shared_worker.task("order.raise")

    results = [echo.apply_async(("value",), link=link.si(order)) for _ in range(2)]

    assert [result.get(timeout=TIMEOUT) for result in results] == ["value", "value"]
    row = shared_worker.wait_for_row("order.raise", f"order:{order}", lambda row: row.duplicates == 1)
    assert row.processed_status is ProcessedStatus.SUCCESS
    assert len(shared_worker.starts("order.raise", f"order:{order}")) == 1


def test_a_link_with_other_arguments_does_not_fail_its_parent(shared_worker: SharedWorker) -> None:
    m, echo, told = unique(), shared_worker.task("echo"), shared_worker.task("told")

    results = [echo.apply_async((value,), link=told.s().set(message_id=m)) for value in ("one", "two")]

    assert [result.get(timeout=TIMEOUT) for result in results] == ["one", "two"]
    links = [result.children[0] for result in results]
    assert sorted(type(link.get(timeout=TIMEOUT, propagate=False)).__name__ for link in links) == [
        "MessageMismatchError",
        "list",
    ]
    assert len(shared_worker.starts("told", m)) == 1


def test_an_errback_with_an_id_runs_once(shared_worker: SharedWorker) -> None:
    m, fail, told = unique(), shared_worker.task("fail"), shared_worker.task("told")

    results = [fail.apply_async(link_error=told.si("it failed").set(message_id=m)) for _ in range(2)]

    for result in results:
        with pytest.raises(ValueError, match="as told"):
            result.get(timeout=TIMEOUT)
    row = shared_worker.wait_for_row("told", m, lambda row: row.duplicates == 1)
    assert row.processed_status is ProcessedStatus.SUCCESS
    assert len(shared_worker.starts("told", m)) == 1
