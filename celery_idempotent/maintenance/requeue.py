"""Requeue: make a failed or abandoned message wait again, as when it was first sent.

The row becomes pending, as recorded and not yet published. The relay then publishes it (see :mod:`celery_idempotent.producer.relay`), here
or in a worker. So nothing is lost if this process dies, or the broker is down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from celery.utils import uuid

from celery_idempotent.core.records import DISCARDED, FORGOTTEN, MessageKey, NewMessage, ProcessedStatus, Row, Status
from celery_idempotent.core.requeued import Requeued
from celery_idempotent.message.canvas_ids import is_guarded
from celery_idempotent.message.header import HEADER, Header
from celery_idempotent.message.identity import FANOUT
from celery_idempotent.message.serialization import (
    UndecodableError,
    decode_message,
    encode_message,
    serializer_of,
    trace_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from celery_idempotent.queue_log import QueueLog

__all__ = ["NotRequeued", "Requeued", "obstacle", "requeue"]

#: Options that do not apply to a restart: times, expiry, and those of the deliveries that failed.
_OF_BEFORE = ("eta", "countdown", "expires", "retries", "redelivered", "is_eager")


#: The error of a message whose worker had died when it was requeued.
_OWNERLESS = "abandoned: its worker had died, and it was requeued"


@dataclass(frozen=True, slots=True)
class NotRequeued:
    """A message that stays as it is.

    Attributes:
        key: The message.
        reason: Why, and what to do instead; for people.
    """

    key: MessageKey
    reason: str


def obstacle(row: Row) -> str | None:
    """Return why a message in this status cannot be requeued, and what to do instead; ``None`` if it can be."""
    match row.status:
        case Status.DONE if row.error == FORGOTTEN:
            return "it was forgotten, and its arguments are gone; send it again by a call"
        case Status.PENDING:
            return "it already waits; if the broker has lost it, see `recover --lost-after`"
        case Status.PROCESSING if row.lease_left > 0:
            return f"it is running on {row.worker}"
        case Status.PROCESSING if row.processed_status is not None:
            return "its body has run; recovery will send its callbacks: see `recover`"
        case Status.DONE if row.processed_status is ProcessedStatus.SUCCESS:
            return "it succeeded; to run it again, `forget` it and send it again"
        case _:
            return None


def requeue(queue_log: QueueLog, row: Row) -> Requeued | NotRequeued:
    """Make a failed message wait again. It is published later, by :func:`~celery_idempotent.producer.relay.relay`, here or in a worker.

    It starts over with all its retries, without its ETA and its expiry, under its old message id and Celery id. So the first caller's
    AsyncResult will show the new outcome, and a chain continues. Calls that its body made before have the same ids as then, and are not
    made twice. If one of them failed, requeue that one too.

    Args:
        queue_log: The queue log. Its app must know the task.
        row: The row, with its message, as it was read.

    Raises:
        StoreError: The store did not answer, or its schema has another version.

    Atomicity: one statement (compare and set on status, token and task id).
    """
    reason = obstacle(row)
    if reason is not None:
        return NotRequeued(row.key, reason)
    task = queue_log.app.tasks.get(row.key.task_name)
    if not is_guarded(task):
        return NotRequeued(
            row.key,
            "its task is not an IdempotentTask of this app; use the app that has it, or add its module to `imports`",
        )
    if row.message is None:
        return NotRequeued(row.key, "its row no longer has a message")
    try:
        args, kwargs, options = decode_message(queue_log.app, row.message)
    except UndecodableError as error:
        return NotRequeued(row.key, f"its message cannot be read: {error}")
    if options.get("exchange_type") == FANOUT:
        return NotRequeued(
            row.key, "it went to a fanout exchange, so each worker would get it again: send it again instead"
        )
    if row.status is Status.PROCESSING and not queue_log.store.abandon(row, error=row.error or _OWNERLESS):
        return NotRequeued(row.key, "it has changed in the meantime")
    renamed = row.error is not None and row.error.startswith(DISCARDED)
    # After a copy's retry, the row has the copy's message, with the copy's id.
    task_id = uuid() if renamed else str(options.get("task_id") or row.task_id)
    message = NewMessage(
        key=row.key,
        task_id=task_id,
        queue=row.queue,
        fingerprint=row.fingerprint,
        published=False,
        message=encode_message(
            args,
            kwargs,
            _options_of_a_restart(row, options, task_id),
            serializer=serializer_of(task, options),
            trace=trace_of(row.message),
        ),
    )
    if not queue_log.store.resubmit(row, message):
        return NotRequeued(row.key, "it has changed in the meantime")
    return Requeued(row.key, task_id, renamed)


def _options_of_a_restart(row: Row, options: Mapping[str, Any], task_id: str) -> dict[str, Any]:
    """Return the options of a message that starts over."""
    kept = {name: value for name, value in options.items() if name not in _OF_BEFORE}
    sent = Header.read(options.get("headers"))
    headers = {name: value for name, value in (options.get("headers") or {}).items() if name != HEADER}
    # The body's calls are identified by the first Celery id, which differs from the current one after a copy or a renaming.
    original = sent.original_task_id if sent is not None and sent.belongs_to(row.key.task_name, row.task_id) else None
    if original is None and task_id != row.task_id:
        original = row.task_id
    if original is not None:
        headers = replace(Header.new(row.key, task_id, row.fingerprint), original_task_id=original).write(headers)
    return {**kept, "headers": headers or None, "task_id": task_id, "message_id": row.key.message_id}
