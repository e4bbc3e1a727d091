"""Messages to a fanout exchange: each worker gets one, so the producer's own row ends with the publication."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from celery_idempotent.core.records import Claimed, NewMessage, NoResultReason
from celery_idempotent.errors import StoreError

if TYPE_CHECKING:
    from celery_idempotent.producer.guarded import Guarded

__all__ = ["end_broadcast"]

logger = logging.getLogger("celery_idempotent")


def end_broadcast(task: Guarded, message: NewMessage) -> None:
    """End the producer's row of a published message that each worker gets: the workers have rows of their own."""
    store = task.queue_log.store
    try:
        answer = store.claim(message, worker=str(NoResultReason.BROADCAST), lease=task.idempotency.lease, grace=0.0)
        if isinstance(answer, Claimed):
            store.complete(
                answer.claim, result=None, note=NoResultReason.BROADCAST, unique_for=task.idempotency.unique_for
            )
    except StoreError as error:
        logger.warning("%s was published, but its row could not be ended; recovery will end it: %s", message.key, error)
