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
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT, wait_until

#: Nobody listens on the discard port.
NOWHERE = "redis://127.0.0.1:9/0"

SUCCESS = ProcessedStatus.SUCCESS


@pytest.fixture
def producer_without_broker(shared_worker: SharedWorker) -> Celery:
    """Return a producer whose broker is down."""
    return shared_worker.producer(broker=NOWHERE, task_publish_retry=False, broker_connection_timeout=1)


@pytest.fixture
def producer_to_nowhere(shared_worker: SharedWorker) -> Celery:
    """Return a producer that dies between its record and its publication: what it publishes goes nowhere."""
    return shared_worker.producer(broker="memory://")


def count(shared_worker: SharedWorker, task: str) -> int:
    """How many rows a task has; what becomes of those that earlier tests sent does not matter."""
    return sum(count.rows for count in shared_worker.app.queue_log.store.counts() if count.task_name == task)


# -- the broker is down -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["order", "order.raise"])
def test_a_call_that_the_broker_did_not_take_is_withdrawn(
    shared_worker: SharedWorker, producer_without_broker: Celery, task: str
) -> None:
    order = unique("order")

    with pytest.raises(OperationalError):
        producer_without_broker.tasks[task].delay(order)

    assert shared_worker.find(task, f"order:{order}") is None
    result = shared_worker.task(task).delay(order)
    assert not result.duplicate
    assert result.get(timeout=TIMEOUT) == {"order": order, "amount": 1}
    assert len(shared_worker.starts(task, f"order:{order}")) == 1


def test_publications_are_retried_before_that(shared_worker: SharedWorker) -> None:
    order = unique("order")
    policy = {"max_retries": 2, "interval_start": 0, "interval_step": 0.05, "interval_max": 0.05}
    patient = shared_worker.producer(broker=NOWHERE, task_publish_retry_policy=policy, broker_connection_timeout=1)

    with pytest.raises(OperationalError):
        patient.tasks["order"].delay(order)

    assert shared_worker.find("order", f"order:{order}") is None


def test_a_call_without_an_id_is_withdrawn_too(shared_worker: SharedWorker, producer_without_broker: Celery) -> None:
    with pytest.raises(OperationalError):
        producer_without_broker.tasks["add"].apply_async((1, 2), task_id=(task_id := unique("task")))

    assert shared_worker.find("add", task_id) is None


def test_a_chain_whose_first_step_was_not_taken_leaves_nothing(
    shared_worker: SharedWorker, producer_without_broker: Celery
) -> None:
    m, add = unique(), producer_without_broker.tasks["add"]

    with pytest.raises(OperationalError):
        chain(add.s(1, 2).set(message_id=m), add.s(3), app=producer_without_broker).apply_async()

    assert shared_worker.find("add", m) is None


def test_a_failed_publication_leaves_what_was_there_before(
    shared_worker: SharedWorker, producer_without_broker: Celery
) -> None:
    """A duplicate that waits on a canvas of its own is published as a copy; the row is not its to withdraw."""
    m = unique()
    assert shared_worker.task("add").apply_async((1, 2), message_id=m).get(timeout=TIMEOUT) == 3

    with pytest.raises(OperationalError):
        producer_without_broker.tasks["add"].apply_async(
            (1, 2), message_id=m, link=producer_without_broker.tasks["echo"].s()
        )

    assert shared_worker.row("add", m).processed_status is SUCCESS


def test_a_failed_resubmission_leaves_the_failure(shared_worker: SharedWorker, producer_without_broker: Celery) -> None:
    order, flag = unique("order"), shared_worker.path("flag")
    m = f"order:{order}"
    first = shared_worker.task("order.again").delay(order, flag)
    assert isinstance(first.get(timeout=TIMEOUT, propagate=False), ValueError)

    with pytest.raises(OperationalError):
        producer_without_broker.tasks["order.again"].delay(order, flag)

    row = shared_worker.row("order.again", m)
    assert (row.status, row.processed_status, row.error) == (
        Status.DONE,
        ProcessedStatus.FAILURE,
        "ValueError: not yet",
    )
    Path(flag).touch()
    assert shared_worker.task("order.again").delay(order, flag).get(timeout=TIMEOUT) == f"{order} at last"


def test_a_call_that_is_sent_by_name_may_be_sent_again(
    shared_worker: SharedWorker, producer_without_broker: Celery
) -> None:
    """No signal tells of a publication that failed, so the row stays; the next call by name is published all the same."""
    order = unique("order")
    with pytest.raises(OperationalError):
        producer_without_broker.send_task("order", (order,))
    assert shared_worker.row("order", f"order:{order}").status is Status.PENDING

    result = shared_worker.app.send_task("order", (order,))

    assert result.get(timeout=TIMEOUT) == {"order": order, "amount": 1}
    assert len(shared_worker.starts("order", f"order:{order}")) == 1


# -- what cannot be encoded -------------------------------------------------------------------------------------------------


def test_arguments_that_cannot_be_encoded_leave_nothing(shared_worker: SharedWorker) -> None:
    before = count(shared_worker, "echo")

    with pytest.raises(EncodeError):
        shared_worker.task("echo").delay(object())
    with pytest.raises(EncodeError):
        shared_worker.task("echo").apply_async((1,), message_id=(m := unique()), headers={"x": object()})

    assert shared_worker.find("echo", m) is None
    assert count(shared_worker, "echo") == before


def test_an_unknown_serializer_leaves_nothing(shared_worker: SharedWorker) -> None:
    m = unique()

    with pytest.raises(Exception, match="no-such-serializer"):
        shared_worker.task("echo").apply_async((1,), message_id=m, serializer="no-such-serializer")

    assert shared_worker.find("echo", m) is None
    assert shared_worker.task("echo").apply_async((1,), message_id=m).get(timeout=TIMEOUT) == 1


# -- what was recorded and never arrived ------------------------------------------------------------------------------------


def test_a_message_that_was_never_published_is_published_by_a_later_call(
    shared_worker: SharedWorker, producer_to_nowhere: Celery
) -> None:
    m = unique()
    lost = producer_to_nowhere.tasks["echo"].apply_async(("value",), message_id=m)
    first = shared_worker.row("echo", m)

    def published_again(app: Celery) -> Any:
        result = app.tasks["echo"].apply_async(("value",), message_id=m)
        assert (result.id, result.duplicate) == (lost.id, True)
        row = shared_worker.row("echo", m)
        return row.status is not Status.PENDING or row.published_at != first.published_at

    assert not published_again(shared_worker.app), "five minutes have not passed yet"
    impatient = shared_worker.producer(idempotent_lost_after=0.5)
    wait_until(lambda: published_again(impatient), interval=0.2, describe="another publication")

    assert shared_worker.app.AsyncResult(lost.id).get(timeout=TIMEOUT) == "value"
    assert [start.task_id for start in shared_worker.starts("echo", m)] == [lost.id]
    row = shared_worker.row("echo", m)
    assert (row.task_id, row.processed_status, row.token) == (lost.id, SUCCESS, 1)


def test_a_later_call_that_raises_on_duplicates_publishes_a_lost_message(
    shared_worker: SharedWorker, producer_to_nowhere: Celery
) -> None:
    order = unique("order")
    lost = producer_to_nowhere.tasks["order.raise"].delay(order)
    impatient = shared_worker.producer(idempotent_lost_after=0.5)

    def sent() -> Any:
        with suppress(DuplicateMessageError):
            return impatient.tasks["order.raise"].delay(order)

    result = wait_until(sent, interval=0.2, describe="another publication")

    assert result.id == lost.id
    assert shared_worker.app.AsyncResult(lost.id).get(timeout=TIMEOUT) == {"order": order, "amount": 1}
    assert len(shared_worker.starts("order.raise", f"order:{order}")) == 1


def test_of_two_publications_of_one_message_one_runs(shared_worker: SharedWorker) -> None:
    """It was not lost, only late: both copies are there, and the claim absorbs one."""
    m = unique()
    first = shared_worker.task("echo").apply_async(("value",), message_id=m, countdown=1)
    shared_worker.deliver("echo", ("value",), message_id=m, task_id=first.id, countdown=1)

    assert first.get(timeout=TIMEOUT) == "value"
    shared_worker.assert_done("echo", m, SUCCESS, starts=1, token=1, duplicates=1)
