"""Messages of producers that do not have this library: other programs with Celery, and with nothing but a broker client."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from kombu.connection import Connection
from kombu.messaging import Producer

from celery_idempotent import ConfigurationError, MessageMismatchError
from celery_idempotent.core.records import Claimed, Inserted, MessageKey, NewMessage, ProcessedStatus, Status
from celery_idempotent.message.serialization import encode_message, encode_result
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT, wait_until

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE


def publish(
    shared_worker: SharedWorker, task: str, *args: Any, task_id: str, protocol: int = 2, **properties: Any
) -> None:
    """Publish a task's message with kombu alone."""
    headers: dict[str, Any] = {}
    body: Any = {"task": task, "id": task_id, "args": args, "kwargs": {}}
    if protocol == 2:
        headers = {"task": task, "id": task_id, "lang": "c"}
        body = [args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    with Connection(shared_worker.spec.broker) as connection:
        Producer(connection).publish(
            body, routing_key=shared_worker.spec.queue, serializer="json", headers=headers, **properties
        )


def test_a_message_with_nothing_but_the_property_is_known_by_it(shared_worker: SharedWorker) -> None:
    m, first, second = unique(), str(uuid4()), str(uuid4())

    publish(shared_worker, "echo", "value", task_id=first, message_id=m)
    assert shared_worker.app.AsyncResult(first).get(timeout=TIMEOUT) == "value"
    publish(shared_worker, "echo", "value", task_id=second, message_id=m)
    assert shared_worker.app.AsyncResult(second).get(timeout=TIMEOUT) == "value"

    row = shared_worker.row("echo", m)
    assert (row.status, row.processed_status, row.token, row.duplicates) == (Status.DONE, SUCCESS, 1, 1)
    assert (row.task_id, row.queue, row.message) == (first, shared_worker.spec.queue, None)
    assert row.fingerprint is not None
    assert [start.task_id for start in shared_worker.starts("echo", m)] == [first]


def test_a_message_without_it_is_known_by_its_task_id(shared_worker: SharedWorker) -> None:
    task_id = str(uuid4())

    publish(shared_worker, "add", 1, 2, task_id=task_id)
    assert shared_worker.app.AsyncResult(task_id).get(timeout=TIMEOUT) == 3
    publish(shared_worker, "add", 1, 2, task_id=task_id)

    row = shared_worker.wait_for_row("add", task_id, lambda row: row.duplicates == 1)
    assert (row.task_id, row.processed_status, row.token) == (task_id, SUCCESS, 1)
    assert len(shared_worker.ledger.starts("add", task_id=task_id)) == 1


def test_a_message_of_the_first_protocol_is_guarded(shared_worker: SharedWorker) -> None:
    m, first, second = unique(), str(uuid4()), str(uuid4())

    for task_id in (first, second):
        publish(shared_worker, "add", 1, 2, task_id=task_id, protocol=1, message_id=m)
        assert shared_worker.app.AsyncResult(task_id).get(timeout=TIMEOUT) == 3

    assert len(shared_worker.starts("add", m)) == 1


def test_a_message_written_by_hand_is_guarded(shared_worker: SharedWorker) -> None:
    """As a shell script would put it on the broker's list: the envelope of kombu's Redis transport, and no more."""
    m, task_id = unique(), str(uuid4())
    body = base64.b64encode(json.dumps([["value"], {}, {}]).encode()).decode()
    envelope = {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"id": task_id, "task": "echo"},
        "properties": {
            "message_id": m,
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": shared_worker.spec.queue},
            "delivery_tag": str(uuid4()),
        },
    }
    with Connection(shared_worker.spec.broker) as connection:
        client = connection.default_channel.client
        for tag in (1, 2, 3):
            envelope["properties"]["delivery_tag"] = f"{task_id}-{tag}"  # type: ignore[index]
            client.lpush(shared_worker.spec.queue, json.dumps(envelope))

    assert shared_worker.app.AsyncResult(task_id).get(timeout=TIMEOUT) == "value"
    shared_worker.assert_done("echo", m, SUCCESS, starts=1, token=1, duplicates=2)


@pytest.mark.parametrize("task", ["order", "order.arguments", "order.daily"])
@pytest.mark.parametrize("protocol", [1, 2])
def test_a_message_without_an_id_is_known_by_the_tasks_option(
    shared_worker: SharedWorker, task: str, protocol: int
) -> None:
    """The broker's copy has no header: a redelivery computes the id again."""
    order, ids = unique("order"), [str(uuid4()), str(uuid4())]
    args = (order, "monday") if task == "order.daily" else (order,)

    for task_id in (ids[0], ids[1], ids[0]):
        publish(shared_worker, task, *args, task_id=task_id, protocol=protocol)
    values = [shared_worker.app.AsyncResult(task_id).get(timeout=TIMEOUT) for task_id in ids]

    assert values[0] == values[1]
    m = shared_worker.task(task).idempotency.message_id(args, {})
    row = shared_worker.wait_for_row(task, m, lambda row: row.duplicates == 2)
    assert (row.processed_status, row.token) == (SUCCESS, 1)
    assert sum(len(shared_worker.ledger.starts(task, task_id=task_id)) for task_id in ids) == 1
    assert shared_worker.task(task).delay(*args).duplicate


def test_a_foreign_copy_of_our_message_has_the_id_of_our_call(shared_worker: SharedWorker) -> None:
    """Our caller had a tuple, an int for a key and another time; the other producer sends what JSON makes of that."""
    order, task_id = unique("order"), str(uuid4())
    task = shared_worker.task("order.nested")
    ours = task.delay({"id": (order, {1: 2.5}), "seen": 1}, now=1.0)
    assert ours.get(timeout=TIMEOUT) == [[order, {"1": 2.5}], 1.0]

    publish(shared_worker, "order.nested", {"id": [order, {"1": 2.5}]}, 2.0, task_id=task_id)

    assert shared_worker.app.AsyncResult(task_id).get(timeout=TIMEOUT) == ours.get(timeout=TIMEOUT)
    again = task.delay({"id": [order, {"1": 2.5}]}, now=3.0)
    assert (again.id, again.duplicate) == (ours.id, True)
    with pytest.raises(MessageMismatchError):
        task.delay({"id": [order, {"1": 2.5}], "note": "x"}, now=4.0)


def test_a_foreign_message_that_lacks_a_part_of_its_id_is_refused(shared_worker: SharedWorker) -> None:
    task_id = str(uuid4())
    publish(shared_worker, "order.nested", {"idd": unique("order")}, task_id=task_id)

    with pytest.raises(ConfigurationError, match=r"order has no 'id' in this call \(did you mean 'idd'\?\)"):
        shared_worker.app.AsyncResult(task_id).get(timeout=TIMEOUT)
    assert shared_worker.ledger.starts("order.nested", task_id=task_id) == []


def test_a_row_under_the_task_id_goes_before_a_computed_one(shared_worker: SharedWorker) -> None:
    """A worker of an earlier version has claimed the message by its task id."""
    order, task_id = unique("order"), str(uuid4())
    store, key = shared_worker.app.queue_log.store, MessageKey(task_id, "order")
    answer = store.claim(NewMessage(key, task_id), worker="older", lease=60.0, grace=30.0)
    assert isinstance(answer, Claimed)
    assert store.complete(answer.claim, result=encode_result(shared_worker.app, "the first"))

    publish(shared_worker, "order", order, task_id=task_id)

    assert shared_worker.app.AsyncResult(task_id).get(timeout=TIMEOUT) == "the first"
    assert shared_worker.row("order", task_id).duplicates == 1
    assert shared_worker.find("order", f"order:{order}") is None
    assert shared_worker.ledger.starts("order", task_id=task_id) == []


def test_a_first_message_whose_copy_ran_is_not_taken_for_another(shared_worker: SharedWorker) -> None:
    """What keeps it in the meantime is a row under its task id."""
    order, first, copy = unique("order"), str(uuid4()), str(uuid4())
    store, m = shared_worker.app.queue_log.store, f"order:{order}"
    message = encode_message([order], {}, {"task_id": first, "message_id": m}, serializer="json")
    assert store.record(NewMessage(MessageKey(m, "order"), first, message=message)) == Inserted()

    publish(shared_worker, "order", order, task_id=copy)
    assert shared_worker.app.AsyncResult(copy).get(timeout=TIMEOUT) == {"order": order, "amount": 1}
    assert shared_worker.row("order", first).status is Status.PENDING
    publish(shared_worker, "order", order, task_id=first)

    assert shared_worker.app.AsyncResult(first).get(timeout=TIMEOUT) == {"order": order, "amount": 1}
    wait_until(lambda: shared_worker.find("order", first) is None)
    assert [len(shared_worker.ledger.starts("order", task_id=task_id)) for task_id in (first, copy)] == [0, 1]


def test_other_arguments_under_the_same_property_are_refused(shared_worker: SharedWorker) -> None:
    m, first, second = unique(), str(uuid4()), str(uuid4())
    publish(shared_worker, "echo", 1, task_id=first, message_id=m)
    assert shared_worker.app.AsyncResult(first).get(timeout=TIMEOUT) == 1

    publish(shared_worker, "echo", 2, task_id=second, message_id=m)

    with pytest.raises(MessageMismatchError):
        shared_worker.app.AsyncResult(second).get(timeout=TIMEOUT)
    assert len(shared_worker.starts("echo", m)) == 1


def test_retries_and_failures_of_a_foreign_message_are_recorded(shared_worker: SharedWorker) -> None:
    retried, failed = unique(), unique()

    first = shared_worker.deliver("retry_n", (2,), message_id=retried)
    second = shared_worker.deliver("fail", message_id=failed)

    assert first.get(timeout=TIMEOUT) == 2
    assert [start.retries for start in shared_worker.starts("retry_n", retried)] == [0, 1, 2]
    row = shared_worker.row("retry_n", retried)
    assert (row.processed_status, row.attempt, row.token) == (SUCCESS, 2, 3)
    assert isinstance(second.get(timeout=TIMEOUT, propagate=False), ValueError)
    row = shared_worker.row("fail", failed)
    assert (row.processed_status, row.error) == (FAILURE, "ValueError: as told")


def test_a_foreign_message_can_be_published_again_from_its_row(shared_worker: SharedWorker) -> None:
    """The consumer makes its row, with the whole message, so that a crash leaves that."""
    m, gate = unique(), shared_worker.path("gate")
    result = shared_worker.deliver("gated", (gate, "value"), message_id=m)
    shared_worker.wait_for_starts("gated", m)

    row = shared_worker.row("gated", m)

    Path(gate).touch()
    assert row.status is Status.PROCESSING
    assert row.message is not None
    args, kwargs, options = json.loads(row.message.partition(b"\n")[2])
    assert (args, kwargs) == ([gate, "value"], {})
    assert options["task_id"] == result.id
    assert result.get(timeout=TIMEOUT) == "value"


def test_a_call_after_a_foreign_message_is_a_duplicate(shared_worker: SharedWorker) -> None:
    m = unique()
    foreign = shared_worker.deliver("echo", ("value",), message_id=m)
    assert foreign.get(timeout=TIMEOUT) == "value"

    ours = shared_worker.task("echo").apply_async(("value",), message_id=m)

    assert (ours.id, ours.duplicate, ours.get(timeout=TIMEOUT)) == (foreign.id, True, "value")


@pytest.mark.parametrize("wrong", ["", "x" * 300])
def test_a_property_that_is_no_message_id_does_not_harm_the_worker(shared_worker: SharedWorker, wrong: str) -> None:
    task_id = str(uuid4())

    publish(shared_worker, "echo", "value", task_id=task_id, message_id=wrong)

    result = shared_worker.app.AsyncResult(task_id)
    if wrong:
        assert type(result.get(timeout=TIMEOUT, propagate=False)).__name__ == "ConfigurationError"
        assert shared_worker.ledger.starts(task_id=task_id) == []
    else:
        assert result.get(timeout=TIMEOUT) == "value"
        assert shared_worker.row("echo", task_id).processed_status is SUCCESS
    assert shared_worker.task("echo").delay("next").get(timeout=TIMEOUT) == "next"
