"""End the rows of messages whose task has lost its guard since they were recorded, and ran as a plain task."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, NoResultReason
from celery_idempotent.worker.delivery import describe, worker_label

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_idempotent.message.header import Header
    from celery_idempotent.queue_log import QueueLog

__all__ = ["end_unguarded"]

logger = logging.getLogger("celery_idempotent")

#: Seconds of the lease between the two statements that claim and end the row.
_LEASE = 60.0


def end_unguarded(queue_log: QueueLog, header: Header, request: Context, error: BaseException | None) -> None:
    """End the row of a message whose body has run without the guard.

    Args:
        queue_log: The queue log of its app.
        header: The message's header.
        request: Celery's context of the delivery.
        error: The body's exception; ``None`` if it returned.

    Raises:
        StoreError: The row stays as it is.
    """
    store, key = queue_log.store, MessageKey(header.message_id, header.task_name)
    row = store.find(key)
    if row is None or row.task_id != request.id:
        return
    message = NewMessage(key, request.id, attempt=max(request.retries or 0, row.attempt), message=row.message)
    claimed = store.claim(message, worker=worker_label(request.hostname), lease=_LEASE, grace=0.0)
    if not isinstance(claimed, Claimed):
        return
    logger.warning("%s ran without base=IdempotentTask; its row is ended", key)
    if error is None:
        store.complete(claimed.claim, result=None, note=NoResultReason.UNKEPT)
    else:
        store.fail(claimed.claim, error=describe(error))
