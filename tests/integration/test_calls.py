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
from tests.support.bench import PATIENCE, Bench
from tests.support.waiting import wait_until


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
def test_however_a_call_is_written_it_is_one_message(bench: Bench, task: str) -> None:
    order = bench.fresh("order")

    results = [way(bench.task(task), order) for way in WAYS]

    assert {result.id for result in results} == {results[0].id}
    assert [result.duplicate for result in results] == [False] + [True] * (len(WAYS) - 1)
    assert [result.get(timeout=PATIENCE) for result in results] == [{"order": order, "amount": 1}] * len(WAYS)
    assert len(bench.ledger.starts(task, task_id=results[0].id)) == 1
    m = by_arguments()(order, 1) if task == "order.arguments" else f"order:{order}"
    if task == "order":
        assert bench.row(task, m).duplicates == len(WAYS) - 1


def test_an_id_given_with_the_call_works_on_a_task_without_the_option(bench: Bench) -> None:
    m, add = bench.fresh(), bench.task("add")

    first = add.apply_async((1, 2), message_id=m)
    again = add.s(1, 2).set(message_id=m).apply_async()
    option = add.signature((1, 2), message_id=m).apply_async()
    immutable = add.si(1, 2).set(message_id=m).delay()

    assert [result.id for result in (again, option, immutable)] == [first.id] * 3
    assert all(result.duplicate for result in (again, option, immutable))
    assert immutable.get(timeout=PATIENCE) == 3
    assert [start.task_id for start in bench.starts("add", m)] == [first.id]


def test_an_id_given_with_the_call_comes_before_the_option(bench: Bench) -> None:
    m, order = bench.fresh(), bench.fresh("order")

    given = bench.task("order").apply_async((order,), message_id=m)
    usual = bench.task("order").delay(order)

    assert given.id != usual.id
    assert (given.duplicate, usual.duplicate) == (False, False)
    assert given.get(timeout=PATIENCE) == usual.get(timeout=PATIENCE)
    assert (len(bench.starts("order", m)), len(bench.starts("order", f"order:{order}"))) == (1, 1)


def test_one_id_of_two_tasks_is_two_messages(bench: Bench) -> None:
    m = bench.fresh()

    added = bench.task("add").apply_async((1, 2), message_id=m)
    echoed = bench.task("echo").apply_async((3,), message_id=m)

    assert (added.get(timeout=PATIENCE), echoed.get(timeout=PATIENCE)) == (3, 3)
    assert not echoed.duplicate


def test_calls_without_an_id_are_messages_of_their_own(bench: Bench) -> None:
    first, second = bench.task("add").delay(1, 2), bench.task("add").delay(1, 2)

    assert (first.get(timeout=PATIENCE), second.get(timeout=PATIENCE)) == (3, 3)
    assert (first.duplicate, second.duplicate) == (False, False)
    assert [bench.row("add", result.id).task_id for result in (first, second)] == [first.id, second.id]


def test_a_task_id_given_twice_is_a_duplicate(bench: Bench) -> None:
    """Without an id the task id is the message id, and a caller may choose it."""
    chosen = bench.fresh("task")

    first = bench.task("add").apply_async((1, 2), task_id=chosen)
    second = bench.task("add").apply_async((1, 2), task_id=chosen)

    assert (first.duplicate, second.duplicate) == (False, True)
    assert second.get(timeout=PATIENCE) == 3
    assert len(bench.starts("add", chosen)) == 1


def test_a_duplicate_is_raised_where_the_task_says_so(bench: Bench) -> None:
    order = bench.fresh("order")
    first = bench.task("order.raise").delay(order)
    assert first.get(timeout=PATIENCE)

    with pytest.raises(DuplicateMessageError) as caught:
        bench.task("order.raise").delay(order)

    assert (caught.value.message_id, caught.value.task_id) == (f"order:{order}", first.id)
    assert caught.value.status == "done"
    assert len(bench.starts("order.raise", f"order:{order}")) == 1
    assert bench.row("order.raise", f"order:{order}").duplicates == 1


@pytest.mark.parametrize("task", ["order", "order.raise"])
def test_other_arguments_under_one_id_are_refused(bench: Bench, task: str) -> None:
    order = bench.fresh("order")
    first = bench.task(task).delay(order, 500)

    with pytest.raises(MessageMismatchError) as caught:
        bench.task(task).delay(order, 900)

    assert (caught.value.message_id, caught.value.task_name) == (f"order:{order}", task)
    assert first.get(timeout=PATIENCE) == {"order": order, "amount": 500}
    assert len(bench.starts(task, f"order:{order}")) == 1


def test_other_arguments_are_refused_for_an_id_given_with_the_call(bench: Bench) -> None:
    m = bench.fresh()
    bench.task("add").apply_async((1, 2), message_id=m)

    with pytest.raises(MessageMismatchError):
        bench.task("add").apply_async((1, 3), message_id=m)


def test_without_a_fingerprint_the_first_arguments_stand(bench: Bench) -> None:
    order = bench.fresh("order")
    bench.task("order.loose").delay(order, 500)

    second = bench.task("order.loose").delay(order, 900)

    assert second.duplicate
    assert second.get(timeout=PATIENCE) == {"order": order, "amount": 500}


def test_a_callable_makes_the_id(bench: Bench) -> None:
    order = bench.fresh("order")

    monday = bench.task("order.daily").delay(order, day="monday")
    again = bench.task("order.daily").delay(order_id=order, day="monday")
    tuesday = bench.task("order.daily").delay(order, "tuesday")

    assert (again.id, again.duplicate, tuesday.duplicate) == (monday.id, True, False)
    assert monday.get(timeout=PATIENCE) == f"{order} on monday"
    assert tuesday.get(timeout=PATIENCE) == f"{order} on tuesday"
    assert len(bench.starts("order.daily", f"day:monday:{order}")) == 1


def test_an_id_is_free_again_when_its_time_is_over(bench: Bench) -> None:
    order = bench.fresh("order")
    task, m = bench.task("order.window"), f"order:{order}"
    first = task.delay(order)
    before = bench.done("order.window", m)
    assert before.expires_at is not None
    assert before.processed_timestamp is not None
    assert (before.expires_at - before.processed_timestamp).total_seconds() == pytest.approx(1.0, abs=0.1)

    second = wait_until(lambda: None if (result := task.delay(order)).duplicate else result, interval=0.2)

    assert second.id != first.id
    assert second.get(timeout=PATIENCE) == {"order": order, "amount": 1}
    assert [start.task_id for start in bench.starts("order.window", m)] == [first.id, second.id]
    row = bench.row("order.window", m)
    assert (row.task_id, row.token, row.processed_status) == (second.id, 2, ProcessedStatus.SUCCESS)
    assert row.created_timestamp >= before.expires_at


def test_a_failed_message_stays_taken(bench: Bench) -> None:
    m = bench.fresh()
    first = bench.task("fail").apply_async(message_id=m)
    assert isinstance(first.get(timeout=PATIENCE, propagate=False), ValueError)

    second = bench.task("fail").apply_async(message_id=m)

    assert (second.id, second.duplicate) == (first.id, True)
    with pytest.raises(ValueError, match="as told"):
        second.get(timeout=PATIENCE)
    assert len(bench.starts("fail", m)) == 1


def test_a_failed_message_is_sent_again_where_the_task_says_so(bench: Bench) -> None:
    order, flag = bench.fresh("order"), bench.path("flag")
    task, m = bench.task("order.again"), f"order:{order}"
    first = task.delay(order, flag)
    assert isinstance(first.get(timeout=PATIENCE, propagate=False), ValueError)
    Path(flag).touch()

    second = task.delay(order, flag)

    assert (second.duplicate, second.id == first.id) == (False, False)
    assert second.get(timeout=PATIENCE) == f"{order} at last"
    row = bench.row("order.again", m)
    assert (row.task_id, row.token, row.status) == (second.id, 2, Status.DONE)
    assert (row.processed_status, row.error, row.message) == (ProcessedStatus.SUCCESS, None, None)
    # What succeeded is not sent again.
    third = task.delay(order, flag)
    assert (third.id, third.duplicate) == (second.id, True)
    assert len(bench.starts("order.again", m)) == 2


def test_a_call_that_cannot_be_identified_leaves_nothing(bench: Bench) -> None:
    m = bench.fresh()
    with pytest.raises(ConfigurationError, match="canonical"):
        bench.task("echo").apply_async((object(),), message_id=m)
    assert bench.find("echo", m) is None

    for wrong in ("", "x" * 256, 7):
        with pytest.raises(ConfigurationError, match="message"):
            bench.task("echo").apply_async((1,), message_id=wrong)


def test_a_call_that_the_body_does_not_take_leaves_nothing(bench: Bench) -> None:
    m = bench.fresh()

    with pytest.raises(TypeError):
        bench.task("add").apply_async((1, 2, 3, 4), message_id=m)

    assert bench.find("add", m) is None


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="Celery dumps the models that a caller gives since 5.7")
def test_a_model_is_taken_as_celery_takes_it(bench: Bench) -> None:
    task, number = bench.task("modelled"), randrange(2**31)

    first = task.delay(Order(number=number))
    again = [task.delay(Order(number=number)), task.delay(order=Order(number=number)), task.delay({"number": number})]

    assert first.get(timeout=PATIENCE) == number
    assert [(result.id, result.duplicate) for result in again] == [(first.id, True)] * 3
    assert len(bench.starts("modelled", f"order:{number}")) == 1


def test_a_call_that_does_not_fit_an_untyped_task_fails_in_its_worker(bench: Bench) -> None:
    m = bench.fresh()

    result = bench.task("untyped").apply_async(("o-1", 2, 3), message_id=m)

    assert isinstance(result.get(timeout=PATIENCE, propagate=False), TypeError)
    assert bench.done("untyped", m).processed_status is ProcessedStatus.FAILURE
