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

from celery_idempotent import MessageMismatchError
from celery_idempotent.core.records import Claimed, Inserted, MessageKey, NewMessage, ProcessedStatus, Status
from celery_idempotent.message.serialization import encode_message, encode_result
from tests.support.bench import PATIENCE, Bench
from tests.support.waiting import wait_until

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE


def publish(bench: Bench, task: str, *args: Any, task_id: str, protocol: int = 2, **properties: Any) -> None:
    """Publish a task's message with kombu alone."""
    headers: dict[str, Any] = {}
    body: Any = {"task": task, "id": task_id, "args": args, "kwargs": {}}
    if protocol == 2:
        headers = {"task": task, "id": task_id, "lang": "c"}
        body = [args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    with Connection(bench.spec.broker) as connection:
        Producer(connection).publish(
            body, routing_key=bench.spec.queue, serializer="json", headers=headers, **properties
        )


def test_a_message_with_nothing_but_the_property_is_known_by_it(bench: Bench) -> None:
    m, first, second = bench.fresh(), str(uuid4()), str(uuid4())

    publish(bench, "echo", "value", task_id=first, message_id=m)
    assert bench.app.AsyncResult(first).get(timeout=PATIENCE) == "value"
    publish(bench, "echo", "value", task_id=second, message_id=m)
    assert bench.app.AsyncResult(second).get(timeout=PATIENCE) == "value"

    row = bench.row("echo", m)
    assert (row.status, row.processed_status, row.token, row.duplicates) == (Status.DONE, SUCCESS, 1, 1)
    assert (row.task_id, row.queue, row.message) == (first, bench.spec.queue, None)
    assert row.fingerprint is not None
    assert [start.task_id for start in bench.starts("echo", m)] == [first]


def test_a_message_without_it_is_known_by_its_task_id(bench: Bench) -> None:
    task_id = str(uuid4())

    publish(bench, "add", 1, 2, task_id=task_id)
    assert bench.app.AsyncResult(task_id).get(timeout=PATIENCE) == 3
    publish(bench, "add", 1, 2, task_id=task_id)

    row = bench.wait_for_row("add", task_id, lambda row: row.duplicates == 1)
    assert (row.task_id, row.processed_status, row.token) == (task_id, SUCCESS, 1)
    assert len(bench.ledger.starts("add", task_id=task_id)) == 1


def test_a_message_of_the_first_protocol_is_guarded(bench: Bench) -> None:
    m, first, second = bench.fresh(), str(uuid4()), str(uuid4())

    for task_id in (first, second):
        publish(bench, "add", 1, 2, task_id=task_id, protocol=1, message_id=m)
        assert bench.app.AsyncResult(task_id).get(timeout=PATIENCE) == 3

    assert len(bench.starts("add", m)) == 1


def test_a_message_written_by_hand_is_guarded(bench: Bench) -> None:
    """As a shell script would put it on the broker's list: the envelope of kombu's Redis transport, and no more."""
    m, task_id = bench.fresh(), str(uuid4())
    body = base64.b64encode(json.dumps([["value"], {}, {}]).encode()).decode()
    envelope = {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"id": task_id, "task": "echo"},
        "properties": {
            "message_id": m,
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": bench.spec.queue},
            "delivery_tag": str(uuid4()),
        },
    }
    with Connection(bench.spec.broker) as connection:
        client = connection.default_channel.client
        for tag in (1, 2, 3):
            envelope["properties"]["delivery_tag"] = f"{task_id}-{tag}"  # type: ignore[index]
            client.lpush(bench.spec.queue, json.dumps(envelope))

    assert bench.app.AsyncResult(task_id).get(timeout=PATIENCE) == "value"
    row = bench.wait_for_row("echo", m, lambda row: row.duplicates == 2)
    assert (row.processed_status, row.token) == (SUCCESS, 1)
    assert len(bench.starts("echo", m)) == 1


@pytest.mark.parametrize("task", ["order", "order.arguments", "order.daily"])
@pytest.mark.parametrize("protocol", [1, 2])
def test_a_message_without_an_id_is_known_by_the_tasks_option(bench: Bench, task: str, protocol: int) -> None:
    """The broker's copy has no header: a redelivery computes the id again."""
    order, ids = bench.fresh("order"), [str(uuid4()), str(uuid4())]
    args = (order, "monday") if task == "order.daily" else (order,)

    for task_id in (ids[0], ids[1], ids[0]):
        publish(bench, task, *args, task_id=task_id, protocol=protocol)
    values = [bench.app.AsyncResult(task_id).get(timeout=PATIENCE) for task_id in ids]

    assert values[0] == values[1]
    m = bench.task(task).idempotency.message_id(args, {})
    row = bench.wait_for_row(task, m, lambda row: row.duplicates == 2)
    assert (row.processed_status, row.token) == (SUCCESS, 1)
    assert sum(len(bench.ledger.starts(task, task_id=task_id)) for task_id in ids) == 1
    assert bench.task(task).delay(*args).duplicate


def test_a_row_under_the_task_id_goes_before_a_computed_one(bench: Bench) -> None:
    """A worker of an earlier version has claimed the message by its task id."""
    order, task_id = bench.fresh("order"), str(uuid4())
    store, key = bench.app.queue_log.store, MessageKey(task_id, "order")
    answer = store.claim(NewMessage(key, task_id), worker="older", lease=60.0, grace=30.0)
    assert isinstance(answer, Claimed)
    assert store.complete(answer.claim, result=encode_result(bench.app, "the first"))

    publish(bench, "order", order, task_id=task_id)

    assert bench.app.AsyncResult(task_id).get(timeout=PATIENCE) == "the first"
    assert bench.row("order", task_id).duplicates == 1
    assert bench.find("order", f"order:{order}") is None
    assert bench.ledger.starts("order", task_id=task_id) == []


def test_a_first_message_whose_copy_ran_is_not_taken_for_another(bench: Bench) -> None:
    """What keeps it in the meantime is a row under its task id."""
    order, first, copy = bench.fresh("order"), str(uuid4()), str(uuid4())
    store, m = bench.app.queue_log.store, f"order:{order}"
    message = encode_message([order], {}, {"task_id": first, "message_id": m}, serializer="json")
    assert store.record(NewMessage(MessageKey(m, "order"), first, message=message)) == Inserted()

    publish(bench, "order", order, task_id=copy)
    assert bench.app.AsyncResult(copy).get(timeout=PATIENCE) == {"order": order, "amount": 1}
    assert bench.row("order", first).status is Status.PENDING
    publish(bench, "order", order, task_id=first)

    assert bench.app.AsyncResult(first).get(timeout=PATIENCE) == {"order": order, "amount": 1}
    wait_until(lambda: bench.find("order", first) is None, timeout=PATIENCE)
    assert [len(bench.ledger.starts("order", task_id=task_id)) for task_id in (first, copy)] == [0, 1]


def test_other_arguments_under_the_same_property_are_refused(bench: Bench) -> None:
    m, first, second = bench.fresh(), str(uuid4()), str(uuid4())
    publish(bench, "echo", 1, task_id=first, message_id=m)
    assert bench.app.AsyncResult(first).get(timeout=PATIENCE) == 1

    publish(bench, "echo", 2, task_id=second, message_id=m)

    with pytest.raises(MessageMismatchError):
        bench.app.AsyncResult(second).get(timeout=PATIENCE)
    assert len(bench.starts("echo", m)) == 1


def test_retries_and_failures_of_a_foreign_message_are_recorded(bench: Bench) -> None:
    retried, failed = bench.fresh(), bench.fresh()

    first = bench.deliver("retry_n", (2,), message_id=retried)
    second = bench.deliver("fail", message_id=failed)

    assert first.get(timeout=PATIENCE) == 2
    assert [start.retries for start in bench.starts("retry_n", retried)] == [0, 1, 2]
    row = bench.row("retry_n", retried)
    assert (row.processed_status, row.attempt, row.token) == (SUCCESS, 2, 3)
    assert isinstance(second.get(timeout=PATIENCE, propagate=False), ValueError)
    row = bench.row("fail", failed)
    assert (row.processed_status, row.error) == (FAILURE, "ValueError: as told")


def test_a_foreign_message_can_be_published_again_from_its_row(bench: Bench) -> None:
    """Its row is made by the consumer, with the whole message, which a crash would leave behind."""
    m, gate = bench.fresh(), bench.path("gate")
    result = bench.deliver("gated", (gate, "value"), message_id=m)
    bench.wait_for_starts("gated", m)

    row = bench.row("gated", m)

    Path(gate).touch()
    assert row.status is Status.PROCESSING
    assert row.message is not None
    args, kwargs, options = json.loads(row.message.partition(b"\n")[2])
    assert (args, kwargs) == ([gate, "value"], {})
    assert options["task_id"] == result.id
    assert result.get(timeout=PATIENCE) == "value"


def test_a_call_after_a_foreign_message_is_a_duplicate(bench: Bench) -> None:
    m = bench.fresh()
    foreign = bench.deliver("echo", ("value",), message_id=m)
    assert foreign.get(timeout=PATIENCE) == "value"

    ours = bench.task("echo").apply_async(("value",), message_id=m)

    assert (ours.id, ours.duplicate, ours.get(timeout=PATIENCE)) == (foreign.id, True, "value")


@pytest.mark.parametrize("wrong", ["", "x" * 300])
def test_a_property_that_is_no_message_id_does_not_harm_the_worker(bench: Bench, wrong: str) -> None:
    task_id = str(uuid4())

    publish(bench, "echo", "value", task_id=task_id, message_id=wrong)

    result = bench.app.AsyncResult(task_id)
    if wrong:
        assert type(result.get(timeout=PATIENCE, propagate=False)).__name__ == "ConfigurationError"
        assert bench.ledger.starts(task_id=task_id) == []
    else:
        assert result.get(timeout=PATIENCE) == "value"
        assert bench.row("echo", task_id).processed_status is SUCCESS
    assert bench.task("echo").delay("next").get(timeout=PATIENCE) == "next"
