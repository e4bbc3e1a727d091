"""A broker for one test: an address, and names on it that no other test uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from kombu.connection import Connection

__all__ = ["BROKERS", "Broker", "filesystem_broker", "rabbitmq_broker", "redis_broker"]

#: Every kind of broker that the fixture ``broker`` may be parametrized with.
BROKERS = ("redis", "rabbitmq-classic", "rabbitmq-quorum", "filesystem")


@dataclass(frozen=True, slots=True)
class Broker:
    """A broker as one test sees it.

    Attributes:
        name: One of :data:`BROKERS`.
        url: Its address.
        queue: The default queue, of this test alone.
        transport_options: For ``broker_transport_options``. A test that needs another ``visibility_timeout`` merges it in.
        settings: Celery settings besides that keep this test apart from others on the same server.
        keeps_deliveries: Whether it delivers again what a dead worker did not acknowledge.
    """

    name: str
    url: str
    queue: str
    transport_options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    keeps_deliveries: bool = True
    #: Every queue that was given out.
    queues: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.queues.append(self.queue)

    def other_queue(self, name: str) -> str:
        """Return the name of another queue, or exchange, of this test alone. It is deleted in the end; names made up otherwise stay."""
        self.queues.append(f"{self.queue}-{name}")
        return self.queues[-1]


def redis_broker(url: str) -> Broker:
    """Return a Redis that this test has to itself.

    kombu looks for expired deliveries every 100 s or so, and its keys for them belong to the whole database, not to a queue:
    so the pace is raised, and the server is not shared.
    """
    return Broker(
        name="redis",
        url=url,
        queue=_unique("queue"),
        transport_options={"unacked_restore_interval": 1, "unacked_restore_throttle": 1},
    )


@contextmanager
def rabbitmq_broker(url: str, *, queue_type: str) -> Iterator[Broker]:
    """Queues and exchanges with names of their own on a RabbitMQ that others use too; deleted in the end.

    Args:
        url: The server.
        queue_type: ``classic`` or ``quorum``. Quorum queues are bound to a topic exchange, for only then does Celery have the
            broker delay messages with a countdown.
    """
    queue = _unique("queue")
    broker = Broker(
        name=f"rabbitmq-{queue_type}",
        url=url,
        queue=queue,
        settings={
            "control_exchange": f"{queue}-control",
            "event_exchange": f"{queue}-events",
            "task_default_queue_type": queue_type,
            "task_create_missing_queue_type": queue_type,
            "task_default_exchange_type": "topic" if queue_type == "quorum" else "direct",
        },
    )
    try:
        yield broker
    finally:
        # Patiently: queues that stay take file handles of the server's, until it answers nobody who connects.
        with Connection(url, connect_timeout=60) as connection:
            connection.ensure_connection(max_retries=2)
            channel = connection.default_channel
            for name in broker.queues:
                channel.queue_delete(name)
                channel.exchange_delete(name)
            for name in (f"{queue}-control.pidbox", f"reply.{queue}-control.pidbox", f"{queue}-events"):
                channel.exchange_delete(name)


def filesystem_broker(directory: Path) -> Broker:
    """Files in a folder of this test's. It knows no acknowledgement: what a dead worker had taken is gone."""
    folders = {name: directory / "broker" / name for name in ("queue", "control", "processed")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    return Broker(
        name="filesystem",
        url="filesystem://",
        queue=_unique("queue"),
        transport_options={
            "data_folder_in": str(folders["queue"]),
            "data_folder_out": str(folders["queue"]),
            "control_folder": str(folders["control"]),
            # A message is taken by renaming it: within one file system only one worker can.
            "store_processed": True,
            "processed_folder": str(folders["processed"]),
            "polling_interval": 0.05,
        },
        # kombu's own loses a message in a thousand: a worker may read the file before it is written.
        settings={"broker_transport": "example_project.filesystem_broker:Transport"},
        keeps_deliveries=False,
    )


def _unique(what: str) -> str:
    return f"test-{what}-{uuid4().hex[:12]}"
