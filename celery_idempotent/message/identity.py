"""Which row a delivered message is of, by what the broker has of it.

Most messages carry their message id: as a property, or in the header of a producer with this library. One of another program that has
neither is known by what the task's option ``message_id`` makes of its arguments, at each delivery anew, since the broker's copy never
gets a header. A row under its Celery id goes before that: it was claimed by a worker that did not know better yet.

A fanout exchange delivers one message to each worker, and each is to run it: the node's name is part of its row's id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from celery_idempotent.core.records import MessageKey
from celery_idempotent.core.storable import LONGEST
from celery_idempotent.message.check_id import check_message_id
from celery_idempotent.message.header import Header

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context

__all__ = ["FANOUT", "Identified", "Identity", "identity_of", "identity_of_sent", "is_fanout", "type_of_exchange"]

#: The type of an exchange that delivers to each worker.
FANOUT = "fanout"


class _IdOption(Protocol):
    @property
    def message_id(self) -> Callable[[tuple[Any, ...], dict[str, Any]], str] | None:
        """Makes the message id of a call from its arguments; ``None`` uses the task id."""


class Identified(Protocol):
    """What an identity takes of the task that a message is for."""

    #: Celery's.
    name: Any
    app: Any

    @property
    def idempotency(self) -> _IdOption:
        """The task's options."""


@dataclass(frozen=True, slots=True)
class Identity:
    """By what a delivery is known.

    Attributes:
        message_id: The id that travels with the message, or that its consumer has computed.
        key: The key of its row.
        older: The key of the row that goes first, if it is there.
        node: The worker that the row is for alone; ``None`` for a message that one of all the workers gets.
    """

    message_id: str
    key: MessageKey
    older: MessageKey | None = None
    node: str | None = None


def identity_of(task: Identified, request: Context) -> Identity:
    """Return the identity of a delivery; see :func:`identity_of_sent`."""
    return identity_of_sent(
        task,
        request.id,
        properties=request.properties,
        headers=request.headers,
        args=request.args,
        kwargs=request.kwargs,
        exchange=(request.delivery_info or {}).get("exchange"),
        node=request.hostname,
    )


def identity_of_sent(
    task: Identified,
    task_id: str,
    *,
    properties: Mapping[str, Any] | None,
    headers: Mapping[str, Any] | None,
    args: Any,
    kwargs: Any,
    exchange: str | None,
    node: str | None,
) -> Identity:
    """Return the same by what the message has.

    Raises:
        ConfigurationError: No store can keep its id, or its arguments give none.
        TypeError: They do not fit the body.
    """
    node = (node or "local") if exchange and is_fanout(task.app, exchange) else None
    given = properties.get("message_id") if isinstance(properties, Mapping) else None
    if not given:
        header = Header.read(headers)
        if header is not None and header.task_name == task.name:
            given = header.message_id
    if given or task.idempotency.message_id is None:
        message_id = check_message_id(given or task_id)
        return Identity(message_id, _key(message_id, task.name, node), node=node)
    message_id = check_message_id(task.idempotency.message_id(tuple(args or ()), dict(kwargs or {})))
    older = _key(check_message_id(task_id), task.name, node)
    return Identity(message_id, _key(message_id, task.name, node), older, node)


def is_fanout(app: Celery, exchange: str) -> bool:
    """Return whether an exchange, as this app's queues declare it, delivers to each worker."""
    return type_of_exchange(app, exchange) == FANOUT


def type_of_exchange(app: Celery, exchange: str) -> str | None:
    """Return the type of an exchange, if this app's queues declare it."""
    queues = app.amqp.queues.values()
    return next((str(queue.exchange.type) for queue in queues if queue.exchange.name == exchange), None)


def _key(message_id: str, task_name: str, node: str | None) -> MessageKey:
    if node is None:
        return MessageKey(message_id, task_name)
    of_node = f"{message_id}@{node}"
    if len(of_node.encode()) > LONGEST:
        of_node = hashlib.sha256(of_node.encode()).hexdigest()
    return MessageKey(of_node, task_name)
