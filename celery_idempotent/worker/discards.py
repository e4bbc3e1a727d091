"""End the row of a message that Celery discards, because it was revoked or has expired.

Celery does not reach the task, so the worker's main process decides, in its event loop. That must not wait for a store that is down: each
verb is called once, and none after a failure. If a row could not be ended, recovery publishes the message again, and it is discarded again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from celery_idempotent.core.decision import Delivery, DeliveryAction, decide_delivery
from celery_idempotent.core.records import ABANDONED, Row
from celery_idempotent.errors import ConfigurationError, StoreError
from celery_idempotent.hooks import OutcomeKind, reason_of
from celery_idempotent.message.identity import identity_of
from celery_idempotent.worker.delivery import worker_label

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_idempotent.producer.guarded import Guarded

__all__ = ["EXPIRED", "REVOKED", "discard"]

logger = logging.getLogger("celery_idempotent")

#: Why Celery discards a message. The column ``error`` begins with one of :data:`~celery_idempotent.core.records.DISCARDED`.
REVOKED = "revoked"
EXPIRED = "expired: it was not started in time"


def discard(task: Guarded, request: Context, why: str) -> None:
    """Decide what to do with the row of a discarded delivery, and do it.

    Args:
        task: The task of the message.
        request: Celery's context of the delivery.
        why: :data:`REVOKED` or :data:`EXPIRED`.
    """
    try:
        key = identity_of(task, request).key
    except (ConfigurationError, TypeError):
        return  # no store can keep it, or it does not fit its task, so there is no row
    store = task.queue_log.store
    try:
        # Nearly all such messages still wait, so end the row without reading it first.
        if store.cancel(key, task_id=request.id, error=why, unique_for=task.idempotency.unique_for):
            kind: OutcomeKind | None = OutcomeKind.CANCELLED
        else:
            row = store.find(key)
            kind = None if row is None else _end(task, request, row, why)
    except StoreError as error:
        logger.error("%s was %s, but its row could not be ended: %s", key, why, error)
        return
    if kind is not None:
        task.queue_log.hooks.emit(
            kind,
            key,
            task_id=request.id,
            queue=(request.delivery_info or {}).get("routing_key"),
            attempt=request.retries or 0,
            worker=worker_label(request.hostname),
            reason=reason_of(why),
        )


def _end(task: Guarded, request: Context, row: Row, why: str) -> OutcomeKind | None:
    """Carry out the decision; return the outcome to report."""
    store, unique_for = task.queue_log.store, task.idempotency.unique_for
    delivery = Delivery(request.id, retries=request.retries or 0, discarded=why)
    match decide_delivery(row, delivery, task.idempotency.delivery).action:
        case DeliveryAction.CANCEL:
            # If the row has become pending in between, this ends nothing: the message is published, and discarded again.
            ended = store.abandon(row, error=why, unique_for=unique_for)
            return OutcomeKind.CANCELLED if ended else None
        case DeliveryAction.FORBID:
            store.forbid(row, error=why)
        case DeliveryAction.ABANDON:
            ended = store.abandon(row, error=ABANDONED, unique_for=unique_for)
            return OutcomeKind.ABANDONED if ended else None
        case DeliveryAction.TAKE_OVER_AND_REPLAY:
            # The body had its effect, and Celery has reported the message as revoked, so nothing waits on it any more.
            taken = store.take_over(
                row,
                task_id=request.id,
                worker=worker_label(request.hostname),
                lease=task.idempotency.lease,
                attempt=row.attempt,
            )
            if taken is not None and store.complete(taken.claim, result=None, unique_for=unique_for):
                return OutcomeKind.COMPLETED
        case _:
            pass  # nothing to end
    return None
