"""Recovery publishes the message again as Celery got it, however it was called."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, signature
from celery.canvas import StampingVisitor
from kombu import Exchange, Queue

from celery_idempotent.maintenance.rescue import Rescue
from celery_idempotent.message.header import HEADER
from tests.support.apps import AppSpec, OpenApp
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.parametrize("store_url", ["sqlite"], indirect=True),
    pytest.mark.parametrize("broker", ["redis", "rabbitmq-classic"], indirect=True),
]

GIVEN: dict[str, Any] = {
    "priority": 7,
    "headers": {"tenant": "acme"},
    "serializer": "pickle",
    "compression": "gzip",
    "expires": datetime.now(UTC) + timedelta(hours=1),
    "time_limit": 50,
    "soft_time_limit": 40,
    "shadow": "shown",
}


class Stamp(StampingVisitor):  # type: ignore[misc]
    def on_signature(self, _: Any, **__: Any) -> dict[str, Any]:
        return {"mark": "m-1", "stamped_headers": ["mark"]}


def stamped(app: Celery, queue: str) -> None:
    sent = app.tasks["echo"].si("value")
    sent.stamp(Stamp())
    sent.apply_async(queue=queue, **GIVEN)


WAYS: dict[str, Callable[[Celery, str], object]] = {
    "by name": lambda app, queue: app.send_task("echo", ("value",), queue=queue, **GIVEN),
    "apply_async": lambda app, queue: app.tasks["echo"].apply_async(("value",), queue=queue, **GIVEN),
    "a signature": lambda app, queue: app.tasks["echo"].si("value").set(queue=queue, **GIVEN).apply_async(),
    "a signature by name": lambda app, queue: signature("echo", ("value",), app=app).apply_async(queue=queue, **GIVEN),
    "a stamped signature": stamped,
}


@dataclass(frozen=True)
class Sent:
    """A message as the broker has it."""

    body: Any
    content: tuple[str, str]
    delivery: tuple[str, str]
    priority: int | None
    headers: dict[str, Any]


def taken(app: Celery, queue: str) -> Sent:
    """Return the message that waits in a queue."""
    with app.connection_for_read() as connection, connection.channel() as channel:
        bound = app.amqp.queues[queue](channel)
        message = wait_until(bound.get, describe=f"a message in {queue}")
        message.ack()
        message.accept = {"application/json", "application/x-python-serialize"}
        # What names the sending process, and our own header.
        kept = {name: value for name, value in message.headers.items() if name not in (HEADER, "origin", "retries")}
        return Sent(
            json.loads(json.dumps(message.payload)),  # a tuple is a list
            (message.content_type, message.content_encoding),
            (message.delivery_info["exchange"], message.delivery_info["routing_key"]),
            message.properties.get("priority"),
            {name: value for name, value in kept.items() if name not in ("argsrepr", "kwargsrepr", "ignore_result")},
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("protocol", [1, 2])
def test_it_is_published_again_as_it_was_sent(spec: AppSpec, open_app: OpenApp, way: str, protocol: int) -> None:
    settings = {**spec.settings, "task_protocol": protocol, "accept_content": ["json", "pickle"]}
    app = open_app(replace(spec, settings=settings))
    app.set_current()
    queue = f"{spec.queue}-gpu"
    app.amqp.queues.add(Queue(queue, Exchange(queue), routing_key=queue))

    WAYS[way](app, queue)
    first = taken(app, queue)
    assert Rescue.of(app.queue_log).publish_waiting(0.0) == 1
    second = taken(app, queue)

    assert first.priority == 7
    assert first.headers["tenant"] == "acme"
    assert first.content[0] == "application/x-python-serialize"
    assert first.headers["compression"]
    assert second == first
