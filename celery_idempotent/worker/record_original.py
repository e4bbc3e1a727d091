"""Record the first message of an id under a key of its own, when a copy of it claims or ends the row."""

from __future__ import annotations

import logging

from celery_idempotent.core.records import NewMessage, Row
from celery_idempotent.message.header import Header
from celery_idempotent.message.serialization import UndecodableError, decode_message, trace_of
from celery_idempotent.worker.delivered_message import DeliveredMessage

__all__ = ["note_original", "record_original"]

logger = logging.getLogger("celery_idempotent")


def record_original(delivered: DeliveredMessage) -> None:
    """Record the original under its own key when a copy finishes first, so that its caller still gets an answer.

    Otherwise the original's only record is the copy's row, which is never published again once it is done. If the broker then lost the
    original, its caller and the rest of its chain or chord would get no answer. See ADR 5.
    """
    row = delivered.store.find(delivered.message.key)
    if row is None:
        return
    note_original(delivered, row)
    if row.task_id == delivered.request.id or delivered.is_broadcast:
        return
    own = Header.new(row.key, row.task_id).row_of_its_own
    if own == row.key or not _is_message_of(delivered, row):
        return
    delivered.store.record(
        NewMessage(
            key=own,
            task_id=row.task_id,
            queue=row.queue,
            fingerprint=row.fingerprint,
            attempt=row.attempt,
            message=row.message,
        )
    )


def note_original(delivered: DeliveredMessage, row: Row) -> None:
    """Note the first Celery id in the header: it identifies the body's calls in this attempt and in later ones."""
    # The header of a message requeued under a new id has the first one; its row has only the new one.
    header, task_id = delivered.header, delivered.request.id
    renamed = header.original_task_id if row.task_id == task_id else None
    first = renamed or row.task_id
    delivered.mark(original_task_id=None if first == task_id else first, trace=trace_of(row.message) or header.trace)


def _is_message_of(delivered: DeliveredMessage, row: Row) -> bool:
    """Return whether the row's message was sent under the row's Celery id; after a copy's retry it is the copy's."""
    try:
        return bool(decode_message(delivered.task.app, row.message)[2].get("task_id") == row.task_id)
    except UndecodableError as error:
        logger.warning("the message that was first sent as %s cannot be kept: %s", delivered, error)
        return False
