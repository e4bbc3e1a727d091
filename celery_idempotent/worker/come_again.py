"""Have the message of a run that lost its claim come again, if no other delivery answers its caller."""

from __future__ import annotations

import logging

from celery_idempotent.core.records import FORGOTTEN, Row
from celery_idempotent.errors import StoreError
from celery_idempotent.message.identity import identity_of
from celery_idempotent.worker.delivered_message import DeliveredMessage
from celery_idempotent.worker.hold import SETTLE, hold, hold_while_it_runs
from celery_idempotent.worker.run import Run

__all__ = ["come_again"]

logger = logging.getLogger("celery_idempotent")


def come_again(run: Run) -> Exception | None:
    """Hold the message of a run that lost its claim, if a delivery under another Celery id has taken its place.

    That delivery answers only its own caller. Recovery would answer this run's caller, and what waits on it, only once the row that keeps
    this message is overtaken: on a quiet queue, never. A message that the store has forgotten comes again too, because no other delivery
    has it and what an atomic body wrote was rolled back.

    Returns:
        What to end the run with; ``None`` if this delivery need not come again, or the store gives no answer.
    """
    task, request = run.task, run.request
    if request.is_eager:
        return None
    identity = identity_of(task, request)
    if identity.node is not None:
        return None
    try:
        row = run.queue_log.store.find(run.key)
        if row is None:
            return hold(DeliveredMessage(task, request, identity), SETTLE)
        if row.task_id != run.header.original_id or row.error == FORGOTTEN or not _is_kept(run, row):
            return None
        delivered = DeliveredMessage(task, request, identity)
        if delivered.header.row_of_its_own != row.key:
            delivered.mark(copied=True)  # its own row ends when its caller is answered
        return hold_while_it_runs(delivered, row, max(row.lease_left, row.available_in, 0.0))
    except StoreError as error:
        logger.warning("%s is left to recovery, which answers its caller: %s", run, error)
        return None


def _is_kept(run: Run, row: Row) -> bool:
    """Return whether a run that lost its claim still has to be answered: it has its own row, or another Celery id ran in its row."""
    own = run.header.row_of_its_own
    if own != run.key:
        return run.queue_log.store.find(own) is not None
    return row.ran_task_id not in (None, run.request.id)
