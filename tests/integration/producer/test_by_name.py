"""``send_task``: calls by name, which do not pass through the task's class."""

from __future__ import annotations

from dataclasses import replace

import pytest
from celery import signature

from celery_idempotent import MessageMismatchError
from celery_idempotent.core.records import ProcessedStatus, Status
from tests.support.apps import close_app
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT

SUCCESS = ProcessedStatus.SUCCESS


def test_a_call_by_name_is_recorded_before_it_is_published(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.app.send_task("echo", ("value",), message_id=m, countdown=600)

    row = shared_worker.row("echo", m)
    assert (row.status, row.task_id, row.queue, row.token) == (Status.PENDING, result.id, shared_worker.spec.queue, 0)
    assert (row.fingerprint is None, row.message is None, row.attempt) == (False, False, 0)
    assert row.available_at is not None
    assert 500 < (row.available_at - row.created_timestamp).total_seconds() < 610


@pytest.mark.parametrize("given", ["an id with the call", "the task's format", "the task's callable"])
def test_however_often_it_is_sent_by_name_it_is_one_run(shared_worker: SharedWorker, given: str) -> None:
    order = unique("order")
    task, args, options, m = {
        "an id with the call": ("echo", ("value",), {"message_id": order}, order),
        "the task's format": ("order", (order,), {}, f"order:{order}"),
        "the task's callable": ("order.daily", (order, "monday"), {}, f"day:monday:{order}"),
    }[given]

    results = [shared_worker.app.send_task(task, args, **options) for _ in range(5)]

    values = [result.get(timeout=TIMEOUT) for result in results]
    assert len({result.id for result in results}) == 5
    assert values == [values[0]] * 5
    shared_worker.assert_done(task, m, SUCCESS, starts=1, token=1, duplicates=4)


def test_keywords_and_defaults_are_bound_by_name_too(shared_worker: SharedWorker) -> None:
    order = unique("order")

    results = [
        shared_worker.app.send_task("order.arguments", (order,)),
        shared_worker.app.send_task("order.arguments", kwargs={"order_id": order}),
        shared_worker.app.send_task("order.arguments", (order,), {"amount": 1}),
        shared_worker.task("order.arguments").delay(order),
    ]

    assert results[-1].duplicate
    assert [result.get(timeout=TIMEOUT) for result in results] == [{"order": order, "amount": 1}] * 4
    runs = [shared_worker.ledger.starts("order.arguments", task_id=result.id) for result in results[:3]]
    assert sorted(map(len, runs)) == [0, 0, 1]


def test_a_call_and_a_call_by_name_are_one_message(shared_worker: SharedWorker) -> None:
    m = unique()

    called = shared_worker.task("echo").apply_async(("value",), message_id=m)
    assert called.get(timeout=TIMEOUT) == "value"
    named = shared_worker.app.send_task("echo", ("value",), message_id=m)
    again = shared_worker.task("echo").apply_async(("value",), message_id=m)

    assert named.get(timeout=TIMEOUT) == "value"
    assert (again.id, again.duplicate) == (called.id, True)
    assert len(shared_worker.starts("echo", m)) == 1


def test_without_an_id_each_call_by_name_is_a_message(shared_worker: SharedWorker) -> None:
    results = [shared_worker.app.send_task("add", (1, 2)) for _ in range(2)]

    assert [result.get(timeout=TIMEOUT) for result in results] == [3, 3]
    for result in results:
        row = shared_worker.row("add", result.id)
        assert (row.task_id, row.token, row.duplicates) == (result.id, 1, 0)


def test_the_same_task_id_by_name_is_the_same_message(shared_worker: SharedWorker) -> None:
    chosen = unique("task")
    first = shared_worker.app.send_task("add", (1, 2), task_id=chosen)
    assert first.get(timeout=TIMEOUT) == 3

    shared_worker.app.send_task("add", (1, 2), task_id=chosen)

    shared_worker.assert_done("add", chosen, SUCCESS, starts=1, token=1, duplicates=1)


def test_other_arguments_by_name_fail_that_call_alone(shared_worker: SharedWorker) -> None:
    m = unique()
    first = shared_worker.app.send_task("echo", (1,), message_id=m)
    assert first.get(timeout=TIMEOUT) == 1

    second = shared_worker.app.send_task("echo", (2,), message_id=m)

    with pytest.raises(MessageMismatchError):
        second.get(timeout=TIMEOUT)
    row = shared_worker.row("echo", m)
    assert (row.processed_status, row.task_id) == (SUCCESS, first.id)
    assert len(shared_worker.starts("echo", m)) == 1


def test_signatures_by_name_are_guarded(shared_worker: SharedWorker) -> None:
    m = unique()

    results = [
        signature("echo", args=("value",), app=shared_worker.app).set(message_id=m).apply_async(),
        shared_worker.app.signature("echo", args=("value",)).set(message_id=m).apply_async(),
    ]

    assert results[0].get(timeout=TIMEOUT) == "value"
    shared_worker.assert_done("echo", m, SUCCESS, starts=1, token=1)


def test_a_process_that_has_not_touched_its_tasks_yet_is_guarded(shared_worker: SharedWorker) -> None:
    """Tasks are bound to their app at its first use, which may be this very call."""
    order = unique("order")
    # One module: another registers a class, which touches all tasks.
    app = replace(shared_worker.spec, tasks=("tests.support.apps.identified",)).build()
    assert not app.finalized

    result = app.send_task("order", (order,))

    try:
        assert result.get(timeout=TIMEOUT) == {"order": order, "amount": 1}
        row = shared_worker.wait_until_done("order", f"order:{order}")
        assert (row.task_id, row.duplicates) == (result.id, 0)
        assert shared_worker.task("order").delay(order).duplicate
    finally:
        close_app(app)


def test_each_app_of_a_process_records_its_own(shared_worker: SharedWorker) -> None:
    first, second = shared_worker.producer(), shared_worker.producer()
    for app in (first, second):
        app.finalize()
    ids = [unique() for _ in range(3)]

    for app, m in zip((second, first, shared_worker.app), ids, strict=True):
        app.send_task("echo", ("value",), message_id=m, countdown=600)

    assert [shared_worker.row("echo", m).status for m in ids] == [Status.PENDING] * 3


def test_another_apps_messages_are_left_alone(shared_worker: SharedWorker) -> None:
    """Celery's signals are one for all apps of a process."""
    m = unique()

    result = shared_worker.deliver("echo", ("value",), message_id=m, countdown=600)

    assert result.id
    assert shared_worker.find("echo", m) is None


def test_a_call_by_name_of_the_first_protocol_is_recorded(shared_worker: SharedWorker) -> None:
    order = unique("order")
    first_protocol = shared_worker.producer(task_protocol=1)
    first_protocol.set_current()
    try:
        first = first_protocol.send_task("order", (order,))
        assert first.get(timeout=TIMEOUT) == {"order": order, "amount": 1}
        row = shared_worker.row("order", f"order:{order}")
        assert (row.task_id, row.queue) == (first.id, shared_worker.spec.queue)

        again = first_protocol.send_task("order", (order,))

        assert again.get(timeout=TIMEOUT) == {"order": order, "amount": 1}
    finally:
        shared_worker.app.set_current()
    shared_worker.wait_for_row("order", f"order:{order}", lambda row: row.duplicates == 1)
    assert len(shared_worker.starts("order", f"order:{order}")) == 1
