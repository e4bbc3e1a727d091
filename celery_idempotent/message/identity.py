"""Find the row that a delivered message belongs to.

Most messages carry their message id, as a property or in the header of a producer with this library. For a message with neither, from
another program, the task's option ``message_id`` computes the id from the arguments. That happens at each delivery, since the broker's copy
never gets a header. If there is a row under the Celery id, that row wins: an older worker has claimed it.

A fanout exchange delivers one message to each worker, and each must run it. So the node's name is part of the row's id.
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
    """What the identity of a message needs from its task."""

    name: Any
    app: Any

    @property
    def idempotency(self) -> _IdOption:
        """The task's options."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of a delivery.

    Attributes:
        message_id: The id that travels with the message, or that its consumer has computed.
        key: The key of its row.
        older: The key of the row to use instead, if that row exists.
        node: The only worker that the row is for; ``None`` unless a fanout exchange has delivered the message.
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
    """Return the identity of a message from its parts.

    Raises:
        ConfigurationError: No store can keep its id, or its arguments give no id.
        TypeError: The arguments do not fit the body.
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
    """Return whether this app's queues declare an exchange as one that delivers to each worker."""
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
