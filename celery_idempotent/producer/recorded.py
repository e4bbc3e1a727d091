"""Publish messages that have a row: by a call's arguments, or from the row itself.

The publisher, the relay and the rescue decide whether to publish.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kombu.exceptions import OperationalError

from celery_idempotent.core.records import ABANDONED, MessageKey, NewMessage, ProcessedStatus, Row, Status
from celery_idempotent.hooks import OutcomeKind, reason_of
from celery_idempotent.message.canvas_ids import is_guarded
from celery_idempotent.message.header import Header
from celery_idempotent.message.identity import FANOUT
from celery_idempotent.message.serialization import UndecodableError, decode_message, trace_of
from celery_idempotent.producer.broadcast import end_broadcast
from celery_idempotent.producer.call_options import expiring_in_workers

if TYPE_CHECKING:
    from celery.result import AsyncResult

    from celery_idempotent.producer.guarded import Guarded
    from celery_idempotent.queue_log import QueueLog

__all__ = ["hand_over", "is_ours", "own_tasks", "publication", "publish", "republish"]

logger = logging.getLogger("celery_idempotent")


def publish(
    task: Guarded,
    args: Any,
    kwargs: Any,
    *,
    header: Header,
    due_in: float | None = None,
    ignore_result: bool,
    headers: Mapping[str, Any] | None = None,
    **options: Any,
) -> AsyncResult[Any]:
    """Publish a message that has a row. Do not subscribe to its result: the caller does not wait for it here.

    Args:
        task: The task.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        header: Its header.
        due_in: Seconds until it may run; ``None`` or less than 0 for at once.
        ignore_result: Whether its worker is to ignore the result.
        headers: Its other headers.
        **options: Options of ``apply_async``.
    """
    if due_in is not None and due_in > 0:
        # To quorum queues, Celery publishes whole seconds only, and raises ValueError for less than one.
        options["countdown"] = max(due_in, 1.0)
    # Celery subscribes to the result of each message that it publishes, which blocks for long while the result backend is down.
    # With `ignore_result` as an option it does not; the header tells the worker the real value.
    headers = {**(headers or {}), "ignore_result": ignore_result}
    return task.publish(
        args,
        kwargs,
        task_id=header.task_id,
        message_id=header.message_id,
        headers=header.write(headers),
        ignore_result=True,
        **options,
    )


# -- from a row ----------------------------------------------------------------------------------------------------------


def own_tasks(queue_log: QueueLog) -> list[str]:
    """Return the guarded tasks of this app. Rows of other apps in the same store are recovered by their own workers."""
    return [name for name, task in queue_log.app.tasks.items() if is_guarded(task)]


def is_ours(queue_log: QueueLog, row: Row) -> bool:
    """Return whether this app can publish a row's message."""
    try:
        decode_message(queue_log.app, _whole(queue_log, row).message)
    except UndecodableError:
        return False
    return True


def republish(queue_log: QueueLog, row: Row) -> bool:
    """Publish a row's message, unless another process is publishing it. Return whether it was published.

    Raises:
        StoreError: The store did not answer, or its schema has another version.
        kombu.exceptions.OperationalError: The broker does not take messages.

    Atomicity: of N concurrent callers one publishes (compare and set of ``published_at``).
    """
    publish = publication(queue_log, row)
    if publish is None or not queue_log.store.republish(row):
        return False
    published = False
    try:
        published = hand_over(queue_log, row, publish)
    finally:
        if not published:
            queue_log.store.not_published(row.key, token=row.token)
    return published


def hand_over(queue_log: QueueLog, row: Row, publish: Callable[[], object]) -> bool:
    """Hand a row's message to the broker. Return whether this message could be published.

    Raises:
        kombu.exceptions.OperationalError: The broker does not take messages.
    """
    name = str(row.key)
    try:
        publish()
    except OperationalError:
        raise
    except Exception:
        logger.exception("%s could not be published again", name)
        return False
    if row.published_at is None:
        logger.warning("%s is published: it waited in the queue log", name)
    else:
        logger.warning("%s is published again: it was %s", name, row.status)
    if row.status is Status.PROCESSING:
        _emit(queue_log, OutcomeKind.RECOVERED, row, "taken_back")
    else:
        _emit(queue_log, OutcomeKind.RECOVERED, row, "lost" if row.published_at else "relayed")
    return True


def publication(queue_log: QueueLog, row: Row) -> Callable[..., object] | None:
    """Return a function that publishes a row's message, and takes more options; ``None`` if that is impossible: this ends a message without an owner."""
    task = queue_log.app.tasks[row.key.task_name]
    if row.forbidden:
        if queue_log.store.abandon(row, error=row.error or ABANDONED, unique_for=task.idempotency.unique_for):
            _emit(queue_log, OutcomeKind.CANCELLED, row, reason_of(row.error or ABANDONED))
        return None
    if row.message is None:
        # Lists of rows leave out large messages: read this one when it is published.
        return partial(_publish_whole, queue_log, row)
    return _publication_of(queue_log, row, row)


def _publish_whole(queue_log: QueueLog, row: Row, **options: Any) -> None:
    whole = queue_log.store.find(row.key)
    publish = None if whole is None else _publication_of(queue_log, row, whole)
    if publish is None:
        raise UndecodableError("the row is gone, or its message cannot be published")
    publish(**options)


def _publication_of(queue_log: QueueLog, row: Row, whole: Row) -> Callable[..., object] | None:
    task = queue_log.app.tasks[row.key.task_name]
    try:
        args, kwargs, options = decode_message(queue_log.app, whole.message)
    except UndecodableError as error:
        logger.error("%s cannot be published again: %s", row.key, error)
        if row.status is Status.PROCESSING:
            ended = queue_log.store.abandon(row, error=f"{ABANDONED}; {error}", unique_for=task.idempotency.unique_for)
            if ended:
                _emit(queue_log, OutcomeKind.ABANDONED, row, "abandoned")
        return None
    if options.get("exchange_type") == FANOUT and (row.published_at or row.key.message_id != options["message_id"]):
        _end_broadcast(queue_log, task, row, options["message_id"])
        return None
    # The key of a copy's own row is its task id; the message in the row has the id of the original message.
    message_id = options.get("message_id") or row.key.message_id
    key = MessageKey(message_id, row.key.task_name)
    # After a copy's retry, the row holds the copy's message, whose caller waits under the copy's own Celery id.
    task_id = options.get("task_id") or row.task_id
    # The header of a retry has the original task id, by which the body's calls are identified.
    sent = Header.delivered(key, task_id, options.get("headers")) or Header.new(key, task_id)
    header = replace(sent, fingerprint=row.fingerprint, holds=0, trace=trace_of(row.message))
    if key != row.key:
        header = replace(header, copied=True, call=None if row.key.message_id == task_id else row.key.message_id)
    elif header.original_task_id is None and task_id != row.task_id:
        header = replace(header, original_task_id=row.task_id)
    # Options that the row knows better, and those of a single delivery.
    replaced: tuple[str, ...] = (
        "eta",
        "task_id",
        "message_id",
        "retries",
        "redelivered",
        "is_eager",
        "ignore_result",
    )
    if row.processed_status is ProcessedStatus.SUCCESS:
        replaced += ("expires",)  # its body ran in time
    kept = {name: value for name, value in options.items() if name not in replaced}
    return partial(
        publish,
        task,
        args,
        kwargs,
        header=header,
        due_in=row.available_in if row.status is Status.PENDING else None,
        ignore_result=options.get("ignore_result", task.ignore_result),
        retries=row.attempt,
        **expiring_in_workers(queue_log.app, kept),
    )


def _end_broadcast(queue_log: QueueLog, task: Guarded, row: Row, message_id: str) -> None:
    """End the row of a broadcast message, which must not be published again: the producer's row, or that of a worker that died."""
    unique_for = task.idempotency.unique_for
    if row.status is Status.PROCESSING:
        ended = queue_log.store.abandon(row, error=ABANDONED, unique_for=unique_for)
    elif row.key.message_id == message_id:
        end_broadcast(task, NewMessage(row.key, row.task_id))
        ended = False
    elif row.attempt == 0:
        ended = False  # it was given back to the broker, which still has it
    else:
        error = f"{ABANDONED}; a retry to a fanout exchange is not published again"
        ended = queue_log.store.cancel(row.key, task_id=row.task_id, error=error, unique_for=unique_for)
    if ended:
        _emit(queue_log, OutcomeKind.ABANDONED, row, "abandoned")


def _emit(queue_log: QueueLog, kind: OutcomeKind, row: Row, reason: str) -> None:
    """Report an outcome of a row to the app's hooks."""
    queue_log.hooks.emit(
        kind, row.key, row=row, task_id=row.task_id, queue=row.queue, attempt=row.attempt, reason=reason
    )


def _whole(queue_log: QueueLog, row: Row) -> Row:
    """Return a row with its message, which lists of rows leave out if it is large."""
    return row if row.message is not None else queue_log.store.find(row.key) or row
