"""Messages that RabbitMQ routes: by a topic exchange without a queue's name, and back from a dead-letter queue."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import TaskRevokedError

from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, ProcessedStatus, Row, Status
from celery_idempotent.maintenance.rescue import Rescue
from tests.support.apps import AppSpec, OpenApp
from tests.support.brokers import Broker
from tests.support.ledger import Ledger
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import StartWorker

TASKS = ("tests.support.apps.generic", "tests.support.apps.routing")

pytestmark = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


@pytest.mark.parametrize("typed", [True, False], ids=["a route with the exchange's type", "without"])
@pytest.mark.parametrize("broker", ["rabbitmq-quorum"], indirect=True)
def test_a_copy_is_held_where_routes_name_no_queue(
    spec: AppSpec,
    broker: Broker,
    open_app: OpenApp,
    start_worker: StartWorker,
    ledger: Ledger,
    tmp_path: Path,
    typed: bool,
) -> None:
    route = {"exchange": broker.other_queue("topic"), "routing_key": f"{spec.queue}.work.now"}
    settings = {
        **spec.settings,
        "task_default_queue_type": "quorum",
        "task_routes": {"gated": {**route, **({"exchange_type": "topic"} if typed else {})}},
    }
    told = replace(spec, settings=settings, tasks=TASKS)
    app = open_app(told)
    worker = start_worker(told, pool="threads", concurrency=3, queues=[broker.other_queue("work")])
    gate = str(tmp_path / "gate")
    key = MessageKey("m-1", "gated")

    def row() -> Row:
        found: Row | None = app.queue_log.store.find(key)
        assert found is not None
        return found

    first = app.tasks["gated"].apply_async((gate, "value"), message_id="m-1")
    wait_until(lambda: ledger.starts("gated"))
    assert row().queue == f"{spec.queue}.work.now"
    app.tasks["gated"].publish((gate, "value"), {}, task_id=first.id, message_id="m-1")
    worker.wait_for_log("gated[m-1] is held for")
    Path(gate).touch()

    assert first.get(timeout=TIMEOUT) == "value"
    wait_until(lambda: row().duplicates == 1, describe=lambda: str(row()))
    assert len(ledger.starts("gated")) == 1
    assert "KeyError" not in worker.log.read_text()


@pytest.mark.parametrize("broker", ["rabbitmq-classic", "rabbitmq-quorum"], indirect=True)
def test_a_rejected_message_that_comes_back_runs_again(
    spec: AppSpec, broker: Broker, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger
) -> None:
    told = replace(spec, tasks=TASKS)
    app = open_app(told)
    rejects, later = broker.other_queue("rejects"), broker.other_queue("later")
    with app.connection_for_write() as connection, connection.channel() as channel:
        app.amqp.queues[later](channel).declare()
    start_worker(told, queues=[rejects])

    result = app.tasks["rejects"].apply_async((2,), queue=rejects, message_id="m-1")

    def ended() -> Row | None:
        row = app.queue_log.store.find(MessageKey("m-1", "rejects"))
        return row if row is not None and row.processed_status is ProcessedStatus.SUCCESS else None

    row: Row = wait_until(ended)
    assert (row.status, row.token) == (Status.DONE, 3)
    assert len(ledger.starts("rejects", task_id=result.id)) == 3


@pytest.mark.parametrize("began", [False, True], ids=["before it began", "after its owner died"])
@pytest.mark.parametrize("broker", ["rabbitmq-classic", "rabbitmq-quorum"], indirect=True)
def test_a_message_that_the_broker_dropped_as_expired_ends(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger, began: bool
) -> None:
    app = open_app(spec)
    key, store = MessageKey("m-1", "echo"), app.queue_log.store
    with app.connection_for_write() as connection, connection.channel() as channel:
        queue = app.amqp.queues[spec.queue](channel)
        queue.declare()
        result = app.tasks["echo"].apply_async(("value",), message_id="m-1", expires=0.2)
        if began:
            claimed = store.claim(NewMessage(key, result.id, message=b""), worker="dead:1", lease=60.0, grace=0.0)
            assert isinstance(claimed, Claimed)
            store.expire(claimed.claim)
        wait_until(
            lambda: queue.queue_declare(passive=True).message_count == 0,
            describe="the end of its time",
        )

    rescue = Rescue.of(app.queue_log)
    assert rescue.publish_lapsed() + rescue.publish_waiting(0.0) == 1
    start_worker(spec)  # a consumer that waits would be given it all the same

    row = wait_for_end(app, key)
    assert row.processed_status is ProcessedStatus.FAILURE
    assert str(row.error).startswith("expired")
    assert ledger.starts("echo") == []
    with pytest.raises(TaskRevokedError):
        result.get(timeout=TIMEOUT)


@pytest.mark.parametrize("broker", ["rabbitmq-classic", "rabbitmq-quorum"], indirect=True)
def test_a_retry_that_has_expired_ends_its_message(spec: AppSpec, open_app: OpenApp, start_worker: StartWorker) -> None:
    """Its worker takes one message at a time: RabbitMQ drops what has expired and nobody waits for."""
    busy = replace(spec, settings={**spec.settings, "worker_prefetch_multiplier": 1})
    app = open_app(busy)
    start_worker(busy, pool="threads", concurrency=1)

    result = app.tasks["retry_late"].apply_async((), message_id="m-1", expires=3)

    row = wait_for_end(app, MessageKey("m-1", "retry_late"))
    assert (row.attempt, row.processed_status) == (1, ProcessedStatus.FAILURE)
    assert str(row.error).startswith("expired")
    with pytest.raises(TaskRevokedError):
        result.get(timeout=TIMEOUT)


@pytest.mark.parametrize("broker", ["rabbitmq-classic"], indirect=True)
def test_a_held_copy_that_has_expired_is_not_dropped(spec: AppSpec, open_app: OpenApp) -> None:
    app = open_app(spec)
    expires = datetime.now(UTC) - timedelta(seconds=1)
    request = Context(
        id="t-1", args=["value"], kwargs={}, expires=expires.isoformat(), delivery_info={"routing_key": spec.queue}
    )
    with app.connection_for_write() as connection, connection.channel() as channel:
        queue = app.amqp.queues[spec.queue](channel)
        queue.declare()

        app.tasks["echo"].publish_copy(request, "m-1", 1.0)

        message = wait_until(lambda: queue.get(no_ack=True))
    assert (message.headers["expires"], message.properties.get("expiration")) == (expires.isoformat(), None)


def wait_for_end(app: Celery, key: MessageKey) -> Row:
    """Wait until a message is done; its row."""

    def ended() -> Row | None:
        row: Row | None = app.queue_log.store.find(key)
        return row if row is not None and row.status is Status.DONE else None

    row: Row = wait_until(ended, describe=lambda: str(app.queue_log.store.find(key)))
    return row
