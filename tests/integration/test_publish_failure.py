"""Publications that fail, and publications that went nowhere: nothing is left that would stand in the next call's way."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain
from kombu.exceptions import EncodeError, OperationalError

from celery_idempotent import DuplicateMessageError
from celery_idempotent.core.records import ProcessedStatus, Status
from tests.support.bench import PATIENCE, Bench
from tests.support.waiting import wait_until

#: Nobody listens on the discard port.
NOWHERE = "redis://127.0.0.1:9/0"

SUCCESS = ProcessedStatus.SUCCESS


@pytest.fixture
def cut_off(bench: Bench) -> Celery:
    """Return a producer whose broker is down."""
    return bench.producer(broker=NOWHERE, task_publish_retry=False, broker_connection_timeout=1)


@pytest.fixture
def void(bench: Bench) -> Celery:
    """Return a producer that dies between its record and its publication: what it publishes goes nowhere."""
    return bench.producer(broker="memory://")


def count(bench: Bench, task: str) -> int:
    """How many rows a task has; what becomes of those that earlier tests sent does not matter."""
    return sum(count.rows for count in bench.app.queue_log.store.counts() if count.task_name == task)


# -- the broker is down -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["order", "order.raise"])
def test_a_call_that_the_broker_did_not_take_is_withdrawn(bench: Bench, cut_off: Celery, task: str) -> None:
    order = bench.fresh("order")

    with pytest.raises(OperationalError):
        cut_off.tasks[task].delay(order)

    assert bench.find(task, f"order:{order}") is None
    result = bench.task(task).delay(order)
    assert not result.duplicate
    assert result.get(timeout=PATIENCE) == {"order": order, "amount": 1}
    assert len(bench.starts(task, f"order:{order}")) == 1


def test_publications_are_retried_before_that(bench: Bench) -> None:
    order = bench.fresh("order")
    policy = {"max_retries": 2, "interval_start": 0, "interval_step": 0.05, "interval_max": 0.05}
    patient = bench.producer(broker=NOWHERE, task_publish_retry_policy=policy, broker_connection_timeout=1)

    with pytest.raises(OperationalError):
        patient.tasks["order"].delay(order)

    assert bench.find("order", f"order:{order}") is None


def test_a_call_without_an_id_is_withdrawn_too(bench: Bench, cut_off: Celery) -> None:
    with pytest.raises(OperationalError):
        cut_off.tasks["add"].apply_async((1, 2), task_id=(task_id := bench.fresh("task")))

    assert bench.find("add", task_id) is None


def test_a_chain_whose_first_step_was_not_taken_leaves_nothing(bench: Bench, cut_off: Celery) -> None:
    m, add = bench.fresh(), cut_off.tasks["add"]

    with pytest.raises(OperationalError):
        chain(add.s(1, 2).set(message_id=m), add.s(3), app=cut_off).apply_async()

    assert bench.find("add", m) is None


def test_a_failed_publication_leaves_what_was_there_before(bench: Bench, cut_off: Celery) -> None:
    """A duplicate that waits on a canvas of its own is published as a copy; the row is not its to withdraw."""
    m = bench.fresh()
    assert bench.task("add").apply_async((1, 2), message_id=m).get(timeout=PATIENCE) == 3

    with pytest.raises(OperationalError):
        cut_off.tasks["add"].apply_async((1, 2), message_id=m, link=cut_off.tasks["echo"].s())

    assert bench.row("add", m).processed_status is SUCCESS


def test_a_failed_resubmission_leaves_the_failure(bench: Bench, cut_off: Celery) -> None:
    order, flag = bench.fresh("order"), bench.path("flag")
    m = f"order:{order}"
    first = bench.task("order.again").delay(order, flag)
    assert isinstance(first.get(timeout=PATIENCE, propagate=False), ValueError)

    with pytest.raises(OperationalError):
        cut_off.tasks["order.again"].delay(order, flag)

    row = bench.row("order.again", m)
    assert (row.status, row.processed_status, row.error) == (
        Status.DONE,
        ProcessedStatus.FAILURE,
        "ValueError: not yet",
    )
    Path(flag).touch()
    assert bench.task("order.again").delay(order, flag).get(timeout=PATIENCE) == f"{order} at last"


def test_a_call_that_is_sent_by_name_may_be_sent_again(bench: Bench, cut_off: Celery) -> None:
    """No signal tells of a publication that failed, so the row stays; the next call by name is published all the same."""
    order = bench.fresh("order")
    with pytest.raises(OperationalError):
        cut_off.send_task("order", (order,))
    assert bench.row("order", f"order:{order}").status is Status.PENDING

    result = bench.app.send_task("order", (order,))

    assert result.get(timeout=PATIENCE) == {"order": order, "amount": 1}
    assert len(bench.starts("order", f"order:{order}")) == 1


# -- what cannot be encoded -------------------------------------------------------------------------------------------------


def test_arguments_that_cannot_be_encoded_leave_nothing(bench: Bench) -> None:
    before = count(bench, "echo")

    with pytest.raises(EncodeError):
        bench.task("echo").delay(object())
    with pytest.raises(EncodeError):
        bench.task("echo").apply_async((1,), message_id=(m := bench.fresh()), headers={"x": object()})

    assert bench.find("echo", m) is None
    assert count(bench, "echo") == before


def test_an_unknown_serializer_leaves_nothing(bench: Bench) -> None:
    m = bench.fresh()

    with pytest.raises(Exception, match="no-such-serializer"):
        bench.task("echo").apply_async((1,), message_id=m, serializer="no-such-serializer")

    assert bench.find("echo", m) is None
    assert bench.task("echo").apply_async((1,), message_id=m).get(timeout=PATIENCE) == 1


# -- what was recorded and never arrived ------------------------------------------------------------------------------------


def test_a_message_that_was_never_published_is_published_by_a_later_call(bench: Bench, void: Celery) -> None:
    m = bench.fresh()
    lost = void.tasks["echo"].apply_async(("value",), message_id=m)
    first = bench.row("echo", m)

    def published_again(app: Celery) -> Any:
        result = app.tasks["echo"].apply_async(("value",), message_id=m)
        assert (result.id, result.duplicate) == (lost.id, True)
        row = bench.row("echo", m)
        return row.status is not Status.PENDING or row.published_at != first.published_at

    assert not published_again(bench.app), "five minutes have not passed yet"
    impatient = bench.producer(idempotent_lost_after=0.5)
    wait_until(lambda: published_again(impatient), timeout=PATIENCE, interval=0.2, describe="another publication")

    assert bench.app.AsyncResult(lost.id).get(timeout=PATIENCE) == "value"
    assert [start.task_id for start in bench.starts("echo", m)] == [lost.id]
    row = bench.row("echo", m)
    assert (row.task_id, row.processed_status, row.token) == (lost.id, SUCCESS, 1)


def test_a_later_call_that_raises_on_duplicates_publishes_a_lost_message(bench: Bench, void: Celery) -> None:
    order = bench.fresh("order")
    lost = void.tasks["order.raise"].delay(order)
    impatient = bench.producer(idempotent_lost_after=0.5)

    def sent() -> Any:
        with suppress(DuplicateMessageError):
            return impatient.tasks["order.raise"].delay(order)

    result = wait_until(sent, timeout=PATIENCE, interval=0.2, describe="another publication")

    assert result.id == lost.id
    assert bench.app.AsyncResult(lost.id).get(timeout=PATIENCE) == {"order": order, "amount": 1}
    assert len(bench.starts("order.raise", f"order:{order}")) == 1


def test_of_two_publications_of_one_message_one_runs(bench: Bench) -> None:
    """It was not lost, only late: both copies are there, and the claim absorbs one."""
    m = bench.fresh()
    first = bench.task("echo").apply_async(("value",), message_id=m, countdown=1)
    bench.deliver("echo", ("value",), message_id=m, task_id=first.id, countdown=1)

    assert first.get(timeout=PATIENCE) == "value"
    row = bench.wait_for_row("echo", m, lambda row: row.duplicates == 1)
    assert (row.processed_status, row.token) == (SUCCESS, 1)
    assert len(bench.starts("echo", m)) == 1
