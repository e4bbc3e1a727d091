"""What a caller gets: for the first call, for a duplicate, for other arguments, for an id that is free again."""

from __future__ import annotations

from pathlib import Path
from random import randrange
from typing import Any

import celery
import pytest

from celery_idempotent import ConfigurationError, DuplicateMessageError, MessageMismatchError, by_arguments
from celery_idempotent.core.records import ProcessedStatus, Status
from tests.support.apps.modelled import Order
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT, wait_until


def call_delay(task: Any, order_id: str) -> Any:
    return task.delay(order_id)


def call_keywords(task: Any, order_id: str) -> Any:
    return task.delay(order_id=order_id)


def call_default(task: Any, order_id: str) -> Any:
    return task.delay(order_id, amount=1)


def call_apply_async(task: Any, order_id: str) -> Any:
    return task.apply_async((order_id,))


def call_signature(task: Any, order_id: str) -> Any:
    return task.s(order_id).apply_async()


def call_immutable(task: Any, order_id: str) -> Any:
    return task.si(order_id).delay()


def call_partial(task: Any, order_id: str) -> Any:
    return task.s(amount=1).delay(order_id)


def call_by_call(task: Any, order_id: str) -> Any:
    return task.signature((order_id,), countdown=0).apply_async()


WAYS = [
    call_delay,
    call_keywords,
    call_default,
    call_apply_async,
    call_signature,
    call_immutable,
    call_partial,
    call_by_call,
]


@pytest.mark.parametrize("task", ["order", "order.arguments"])
def test_however_a_call_is_written_it_is_one_message(shared_worker: SharedWorker, task: str) -> None:
    order = unique("order")

    results = [way(shared_worker.task(task), order) for way in WAYS]

    assert {result.id for result in results} == {results[0].id}
    assert [result.duplicate for result in results] == [False] + [True] * (len(WAYS) - 1)
    assert [result.get(timeout=TIMEOUT) for result in results] == [{"order": order, "amount": 1}] * len(WAYS)
    assert len(shared_worker.ledger.starts(task, task_id=results[0].id)) == 1
    m = by_arguments()(order, 1) if task == "order.arguments" else f"order:{order}"
    if task == "order":
        assert shared_worker.row(task, m).duplicates == len(WAYS) - 1


def test_a_call_may_give_an_id_to_any_task(shared_worker: SharedWorker) -> None:
    m, add = unique(), shared_worker.task("add")

    first = add.apply_async((1, 2), message_id=m)
    again = add.s(1, 2).set(message_id=m).apply_async()
    option = add.signature((1, 2), message_id=m).apply_async()
    immutable = add.si(1, 2).set(message_id=m).delay()

    assert [result.id for result in (again, option, immutable)] == [first.id] * 3
    assert all(result.duplicate for result in (again, option, immutable))
    assert immutable.get(timeout=TIMEOUT) == 3
    assert [start.task_id for start in shared_worker.starts("add", m)] == [first.id]


def test_an_id_given_with_the_call_comes_before_the_option(shared_worker: SharedWorker) -> None:
    m, order = unique(), unique("order")

    given = shared_worker.task("order").apply_async((order,), message_id=m)
    usual = shared_worker.task("order").delay(order)

    assert given.id != usual.id
    assert (given.duplicate, usual.duplicate) == (False, False)
    assert given.get(timeout=TIMEOUT) == usual.get(timeout=TIMEOUT)
    assert (len(shared_worker.starts("order", m)), len(shared_worker.starts("order", f"order:{order}"))) == (1, 1)


def test_one_id_of_two_tasks_is_two_messages(shared_worker: SharedWorker) -> None:
    m = unique()

    added = shared_worker.task("add").apply_async((1, 2), message_id=m)
    echoed = shared_worker.task("echo").apply_async((3,), message_id=m)

    assert (added.get(timeout=TIMEOUT), echoed.get(timeout=TIMEOUT)) == (3, 3)
    assert not echoed.duplicate


def test_calls_without_an_id_are_messages_of_their_own(shared_worker: SharedWorker) -> None:
    first, second = shared_worker.task("add").delay(1, 2), shared_worker.task("add").delay(1, 2)

    assert (first.get(timeout=TIMEOUT), second.get(timeout=TIMEOUT)) == (3, 3)
    assert (first.duplicate, second.duplicate) == (False, False)
    assert [shared_worker.row("add", result.id).task_id for result in (first, second)] == [first.id, second.id]


def test_a_task_id_given_twice_is_a_duplicate(shared_worker: SharedWorker) -> None:
    """Without an id the task id is the message id, and a caller may choose it."""
    chosen = unique("task")

    first = shared_worker.task("add").apply_async((1, 2), task_id=chosen)
    second = shared_worker.task("add").apply_async((1, 2), task_id=chosen)

    assert (first.duplicate, second.duplicate) == (False, True)
    assert second.get(timeout=TIMEOUT) == 3
    assert len(shared_worker.starts("add", chosen)) == 1


def test_a_duplicate_is_raised_where_the_task_says_so(shared_worker: SharedWorker) -> None:
    order = unique("order")
    first = shared_worker.task("order.raise").delay(order)
    assert first.get(timeout=TIMEOUT)

    with pytest.raises(DuplicateMessageError) as caught:
        shared_worker.task("order.raise").delay(order)

    assert (caught.value.message_id, caught.value.task_id) == (f"order:{order}", first.id)
    assert caught.value.status == "done"
    assert len(shared_worker.starts("order.raise", f"order:{order}")) == 1
    assert shared_worker.row("order.raise", f"order:{order}").duplicates == 1


@pytest.mark.parametrize("task", ["order", "order.raise"])
def test_other_arguments_under_one_id_are_refused(shared_worker: SharedWorker, task: str) -> None:
    order = unique("order")
    first = shared_worker.task(task).delay(order, 500)

    with pytest.raises(MessageMismatchError) as caught:
        shared_worker.task(task).delay(order, 900)

    assert (caught.value.message_id, caught.value.task_name) == (f"order:{order}", task)
    assert first.get(timeout=TIMEOUT) == {"order": order, "amount": 500}
    assert len(shared_worker.starts(task, f"order:{order}")) == 1


def test_other_arguments_are_refused_for_an_id_given_with_the_call(shared_worker: SharedWorker) -> None:
    m = unique()
    shared_worker.task("add").apply_async((1, 2), message_id=m)

    with pytest.raises(MessageMismatchError):
        shared_worker.task("add").apply_async((1, 3), message_id=m)


def test_without_a_fingerprint_the_first_arguments_stand(shared_worker: SharedWorker) -> None:
    order = unique("order")
    shared_worker.task("order.loose").delay(order, 500)

    second = shared_worker.task("order.loose").delay(order, 900)

    assert second.duplicate
    assert second.get(timeout=TIMEOUT) == {"order": order, "amount": 500}


def test_a_callable_makes_the_id(shared_worker: SharedWorker) -> None:
    order = unique("order")

    monday = shared_worker.task("order.daily").delay(order, day="monday")
    again = shared_worker.task("order.daily").delay(order_id=order, day="monday")
    tuesday = shared_worker.task("order.daily").delay(order, "tuesday")

    assert (again.id, again.duplicate, tuesday.duplicate) == (monday.id, True, False)
    assert monday.get(timeout=TIMEOUT) == f"{order} on monday"
    assert tuesday.get(timeout=TIMEOUT) == f"{order} on tuesday"
    assert len(shared_worker.starts("order.daily", f"day:monday:{order}")) == 1


def test_an_id_is_free_again_when_its_time_is_over(shared_worker: SharedWorker) -> None:
    order = unique("order")
    task, m = shared_worker.task("order.window"), f"order:{order}"
    first = task.delay(order)
    before = shared_worker.wait_until_done("order.window", m)
    assert before.expires_at is not None
    assert before.processed_timestamp is not None
    assert (before.expires_at - before.processed_timestamp).total_seconds() == pytest.approx(1.0, abs=0.1)

    second = wait_until(lambda: None if (result := task.delay(order)).duplicate else result, interval=0.2)

    assert second.id != first.id
    assert second.get(timeout=TIMEOUT) == {"order": order, "amount": 1}
    assert [start.task_id for start in shared_worker.starts("order.window", m)] == [first.id, second.id]
    row = shared_worker.row("order.window", m)
    assert (row.task_id, row.token, row.processed_status) == (second.id, 2, ProcessedStatus.SUCCESS)
    assert row.created_timestamp >= before.expires_at


def test_a_failed_message_stays_taken(shared_worker: SharedWorker) -> None:
    m = unique()
    first = shared_worker.task("fail").apply_async(message_id=m)
    assert isinstance(first.get(timeout=TIMEOUT, propagate=False), ValueError)

    second = shared_worker.task("fail").apply_async(message_id=m)

    assert (second.id, second.duplicate) == (first.id, True)
    with pytest.raises(ValueError, match="as told"):
        second.get(timeout=TIMEOUT)
    assert len(shared_worker.starts("fail", m)) == 1


def test_a_failed_message_is_sent_again_where_the_task_says_so(shared_worker: SharedWorker) -> None:
    order, flag = unique("order"), shared_worker.path("flag")
    task, m = shared_worker.task("order.again"), f"order:{order}"
    first = task.delay(order, flag)
    assert isinstance(first.get(timeout=TIMEOUT, propagate=False), ValueError)
    Path(flag).touch()

    second = task.delay(order, flag)

    assert (second.duplicate, second.id == first.id) == (False, False)
    assert second.get(timeout=TIMEOUT) == f"{order} at last"
    row = shared_worker.row("order.again", m)
    assert (row.task_id, row.token, row.status) == (second.id, 2, Status.DONE)
    assert (row.processed_status, row.error, row.message) == (ProcessedStatus.SUCCESS, None, None)
    # What succeeded is not sent again.
    third = task.delay(order, flag)
    assert (third.id, third.duplicate) == (second.id, True)
    assert len(shared_worker.starts("order.again", m)) == 2


def test_a_call_that_cannot_be_identified_leaves_nothing(shared_worker: SharedWorker) -> None:
    m = unique()
    with pytest.raises(ConfigurationError, match="canonical"):
        shared_worker.task("echo").apply_async((object(),), message_id=m)
    assert shared_worker.find("echo", m) is None

    for wrong in ("", "x" * 256, 7):
        with pytest.raises(ConfigurationError, match="message"):
            shared_worker.task("echo").apply_async((1,), message_id=wrong)


def test_a_call_that_the_body_does_not_take_leaves_nothing(shared_worker: SharedWorker) -> None:
    m = unique()

    with pytest.raises(TypeError):
        shared_worker.task("add").apply_async((1, 2, 3, 4), message_id=m)

    assert shared_worker.find("add", m) is None


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="Celery dumps the models that a caller gives since 5.7")
def test_a_model_is_taken_as_celery_takes_it(shared_worker: SharedWorker) -> None:
    task, number = shared_worker.task("modelled"), randrange(2**31)

    first = task.delay(Order(number=number))
    again = [task.delay(Order(number=number)), task.delay(order=Order(number=number)), task.delay({"number": number})]

    assert first.get(timeout=TIMEOUT) == number
    assert [(result.id, result.duplicate) for result in again] == [(first.id, True)] * 3
    assert len(shared_worker.starts("modelled", f"order:{number}")) == 1


def test_a_bad_call_of_an_untyped_task_fails_in_its_worker(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("untyped").apply_async(("o-1", 2, 3), message_id=m)

    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), TypeError)
    assert shared_worker.wait_until_done("untyped", m).processed_status is ProcessedStatus.FAILURE
