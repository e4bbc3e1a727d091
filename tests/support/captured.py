"""Messages as they lie on a broker: taken off byte by byte, and put back as often as a test wants copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery

from tests.support.waiting import wait_until

__all__ = ["Captured", "capture", "put"]


@dataclass(frozen=True, slots=True)
class Captured:
    """A message as it lay on the broker, byte by byte."""

    body: bytes
    headers: dict[str, Any]
    properties: dict[str, Any]
    content_type: str
    content_encoding: str


def capture(app: Celery, queue: str, count: int = 1) -> list[Captured]:
    """Take messages off a queue that no worker consumes."""
    with app.connection_for_write() as connection:
        source = app.amqp.queues[queue].bind(connection.default_channel)

        def take() -> Captured:
            message = wait_until(lambda: source.get(no_ack=True), describe=f"a message in {queue}")
            properties = {
                name: message.properties[name]
                for name in ("message_id", "correlation_id", "reply_to", "delivery_mode", "priority")
                if message.properties.get(name) is not None
            }
            return Captured(
                message.body, dict(message.headers), properties, message.content_type, message.content_encoding
            )

        return [take() for _ in range(count)]


def put(app: Celery, queue: str, messages: Sequence[Captured], *, times: int = 1) -> None:
    """Put messages on the broker by hand, each so many times, past Celery and past the library.

    Confirmed: RabbitMQ forgets what a connection that is closed at once had not yet handed to a quorum queue.
    """
    options = {**app.conf.broker_transport_options, "confirm_publish": True}
    with app.connection_for_write(transport_options=options) as connection, connection.Producer() as producer:
        for message in [message for message in messages for _ in range(times)]:
            producer.publish(
                message.body,
                exchange="",
                routing_key=queue,
                headers=message.headers,
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                **message.properties,
            )
