"""A later call under a Celery id that was sent before: a frozen signature, or one with a task id, in a second canvas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group

from celery_idempotent.core.records import Row, RowFilter
from celery_idempotent.maintenance.rescue import Rescue
from tests.integration.worker.test_copies import consumed, purge
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT, wait_until


def frozen(shared_worker: SharedWorker, value: str = "value") -> Any:
    signature = shared_worker.task("echo").si(value)
    signature.freeze()
    return signature


@pytest.mark.parametrize("again", ["at once", "when it is done"])
def test_a_frozen_signature_in_two_chains_goes_on_in_both(shared_worker: SharedWorker, again: str) -> None:
    first, told = frozen(shared_worker), shared_worker.task("told")

    results = [chain(first, told.s("one"), app=shared_worker.app).apply_async()]
    if again == "when it is done":
        assert results[0].get(timeout=TIMEOUT) == ["value", "one"]
    results.append(chain(first, told.s("two"), app=shared_worker.app).apply_async())

    assert [result.get(timeout=TIMEOUT) for result in results] == [["value", "one"], ["value", "two"]]
    assert len(shared_worker.starts("echo", first.id)) == 1
    wait_until(lambda: not later_rows(shared_worker, "echo"), describe="the end of the later call's row")


def test_given_ids_in_two_chains_go_on_in_both(shared_worker: SharedWorker) -> None:
    m, told = unique(), shared_worker.task("told")
    first = shared_worker.task("echo").si("value").set(task_id=unique("id"), message_id=m)

    results = [chain(first, told.s(n), app=shared_worker.app).apply_async() for n in range(2)]

    assert [result.get(timeout=TIMEOUT) for result in results] == [["value", 0], ["value", 1]]
    assert len(shared_worker.starts("echo", m)) == 1


def test_every_step_frozen_in_two_chains_goes_on_in_both(shared_worker: SharedWorker) -> None:
    first, second, told = frozen(shared_worker), shared_worker.task("told").s("second"), shared_worker.task("told")
    second.set(task_id=unique("id"))

    results = [chain(first, second, told.s(n), app=shared_worker.app).apply_async() for n in range(2)]

    assert [r.get(timeout=TIMEOUT) for r in results] == [[["value", "second"], 0], [["value", "second"], 1]]


def test_a_frozen_chain_goes_on_after_a_held_first_step(shared_worker: SharedWorker) -> None:
    gate, told = shared_worker.path("gate"), shared_worker.task("told")
    first, second = shared_worker.task("gated").si(gate, "value"), told.s("second")
    first.freeze()
    second.set(task_id=unique("id"))

    results = [chain(first, second, told.s(n), app=shared_worker.app).apply_async() for n in range(2)]
    shared_worker.wait_until_held("gated", first.id)
    Path(gate).touch()

    assert [r.get(timeout=TIMEOUT) for r in results] == [[["value", "second"], 0], [["value", "second"], 1]]
    assert len(shared_worker.starts("gated", first.id)) == 1


def test_a_frozen_signature_goes_on_in_a_header_and_as_a_body(shared_worker: SharedWorker) -> None:
    first, told = frozen(shared_worker), shared_worker.task("told")
    assert chord([first], told.s(), app=shared_worker.app).apply_async().get(timeout=TIMEOUT) == [["value"]]

    body = chord([shared_worker.task("add").s(1, 2)], first | told.s("behind"), app=shared_worker.app).apply_async()

    assert body.get(timeout=TIMEOUT) == ["value", "behind"]
    assert len(shared_worker.starts("echo", first.id)) == 1


def test_a_failed_signature_in_a_second_chain_tells_its_errback(shared_worker: SharedWorker) -> None:
    first, told = (
        shared_worker.task("fail").si("refused").set(task_id=unique("id")),
        shared_worker.task("told"),
    )
    with pytest.raises(Exception, match="refused"):
        chain(first, told.s(), app=shared_worker.app).apply_async().get(timeout=TIMEOUT)

    flag = unique("errback")
    second = chain(first, told.s(), app=shared_worker.app)
    second.link_error(told.si().set(message_id=flag))
    second.apply_async()

    shared_worker.wait_for_starts("told", flag)
    assert len(shared_worker.starts("fail", first.id)) == 1


@pytest.mark.parametrize("place", ["a chain's last step", "a link_error", "a group in a chord's body"])
@pytest.mark.parametrize("style", ["message", "call"])
def test_a_failed_signature_without_more_steps_tells_its_errback(
    shared_worker: SharedWorker, place: str, style: str
) -> None:
    """Celery sends an errback of one parameter as a message, and calls one of three where the task failed."""
    first, told = (
        shared_worker.task("fail").si("refused").set(task_id=unique("id")),
        shared_worker.task("told"),
    )
    with pytest.raises(Exception, match="refused"):
        chain(told.si(), first, app=shared_worker.app).apply_async().get(timeout=TIMEOUT)

    errback = shared_worker.task("errback" if style == "message" else "errback.call")
    match place:
        case "a chain's last step":
            chain(told.si(), first, app=shared_worker.app).on_error(errback.s()).apply_async()
        case "a link_error":
            first.clone().on_error(errback.s()).apply_async()
        case "a group in a chord's body":
            body = group(told.si(), first.clone().on_error(errback.s()), app=shared_worker.app)
            chord([told.si()], body, app=shared_worker.app).apply_async()

    shared_worker.wait_for_note(errback.name, first.id)
    assert len(shared_worker.starts("fail", first.id)) == 1
    wait_until(lambda: not later_rows(shared_worker, "fail"), describe="the end of the later call's row")


def test_a_later_call_by_name_goes_on(shared_worker: SharedWorker) -> None:
    task_id, told = unique("id"), shared_worker.task("told")
    assert shared_worker.task("echo").apply_async(("value",), task_id=task_id).get(timeout=TIMEOUT) == "value"

    flag = unique("link")
    shared_worker.app.send_task("echo", ("value",), task_id=task_id, link=told.si().set(message_id=flag))

    shared_worker.wait_for_starts("told", flag)
    assert len(shared_worker.starts("echo", task_id)) == 1


def test_a_later_call_that_the_broker_lost_comes_back(shared_worker: SharedWorker) -> None:
    first, told, queue = frozen(shared_worker), shared_worker.task("told"), unique("queue")
    assert chain(first, told.s("one"), app=shared_worker.app).apply_async().get(timeout=TIMEOUT) == ["value", "one"]

    second = chain(first.clone().set(queue=queue), told.s("two"), app=shared_worker.app).apply_async()
    purge(shared_worker, queue)
    assert len(later_rows(shared_worker, "echo")) == 1
    assert Rescue.of(shared_worker.app.queue_log).publish_waiting(0.0) >= 1
    with consumed(shared_worker, queue):
        assert second.get(timeout=TIMEOUT) == ["value", "two"]
        wait_until(lambda: not later_rows(shared_worker, "echo"), describe="the end of the later call's row")
    assert len(shared_worker.starts("echo", first.id)) == 1


def later_rows(shared_worker: SharedWorker, task: str) -> list[Row]:
    return list(shared_worker.app.queue_log.store.rows(RowFilter(message_id="again:*", task_name=task)))
