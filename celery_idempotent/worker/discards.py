"""What becomes of a message that Celery discards: it was revoked, or it has expired.

Its task is not reached, so the worker's main process takes the decision. It runs in the worker's event loop, which must not wait for a store
that is down: each verb is asked once, and none after one that failed. A row that could not be ended is published again by recovery, and
discarded again.
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

#: Why Celery discards a message; what is kept in ``error`` begins with one of :data:`~celery_idempotent.core.records.DISCARDED`.
REVOKED = "revoked"
EXPIRED = "expired: it was not started in time"


def discard(task: Guarded, request: Context, why: str) -> None:
    """Decide what becomes of the row of a discarded delivery, and do it.

    Args:
        task: The task it is for.
        request: Celery's context of the delivery.
        why: :data:`REVOKED` or :data:`EXPIRED`.
    """
    try:
        key = identity_of(task, request).key
    except (ConfigurationError, TypeError):
        return  # no store can keep it, or it is no call of its task, so none has a row of it
    store = task.queue_log.store
    try:
        # Nearly every one still waits: it is ended without being read before.
        if store.cancel(key, task_id=request.id, error=why, unique_for=task.idempotency.unique_for):
            kind: OutcomeKind | None = OutcomeKind.CANCELLED
        else:
            row = store.find(key)
            kind = None if row is None else _end(task, request, row, why)
    except StoreError as error:
        logger.error("%s was %s, but its row stays as it is: %s", key, why, error)
        return
    if kind is not None:
        task.queue_log.outcomes.emit(
            kind,
            key,
            task_id=request.id,
            queue=(request.delivery_info or {}).get("routing_key"),
            attempt=request.retries or 0,
            worker=worker_label(request.hostname),
            reason=reason_of(why),
        )


def _end(task: Guarded, request: Context, row: Row, why: str) -> OutcomeKind | None:
    """Carry out the decision; what is to be told of it."""
    store, unique_for = task.queue_log.store, task.idempotency.unique_for
    delivery = Delivery(request.id, retries=request.retries or 0, discarded=why)
    match decide_delivery(row, delivery, task.idempotency.delivery).action:
        case DeliveryAction.CANCEL:
            # Of one that waits again since it was asked to be cancelled, this ends nothing: it is published, and discarded again.
            ended = store.abandon(row, error=why, unique_for=unique_for)
            return OutcomeKind.CANCELLED if ended else None
        case DeliveryAction.FORBID:
            store.forbid(row, error=why)
        case DeliveryAction.ABANDON:
            ended = store.abandon(row, error=ABANDONED, unique_for=unique_for)
            return OutcomeKind.ABANDONED if ended else None
        case DeliveryAction.TAKE_OVER_AND_REPLAY:
            # The body had its effect, and Celery has told the caller that this was revoked: nothing waits on it any more.
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
            pass  # there is nothing to end
    return None
