"""Go on with a claim: one just granted, one whose answer was lost, or one taken over after its lease ran out."""

from __future__ import annotations

import logging
from dataclasses import replace

from celery_idempotent.core.abandoned import Done
from celery_idempotent.core.records import ABANDONED, Claim, Claimed, ProcessedStatus, Row
from celery_idempotent.errors import AlreadyFailedError
from celery_idempotent.hooks import OutcomeKind
from celery_idempotent.message.serialization import encode_result
from celery_idempotent.worker import run_state
from celery_idempotent.worker.delivered_message import DeliveredMessage
from celery_idempotent.worker.delivery import worker_label
from celery_idempotent.worker.record_original import note_original, record_original
from celery_idempotent.worker.replay import replay_claimed
from celery_idempotent.worker.run import Run

__all__ = ["abandon", "resume_own_claim", "settle", "start", "take_over"]

logger = logging.getLogger("celery_idempotent")


def start(delivered: DeliveredMessage, claimed: Claimed, row: Row | None = None) -> Run:
    """Return the run that has a claim.

    Args:
        delivered: The message.
        claimed: The store's answer.
        row: The row as it was before, if it was read.
    """
    # An older copy continues with the row's attempt, so that its retries do not start over.
    attempt = delivered.message.attempt if row is None else max(delivered.message.attempt, row.attempt)
    delivered.message = delivered.run.message = replace(delivered.message, attempt=attempt)
    delivered.request.retries = attempt
    delivered.run.move_to(run_state.Claimed(claimed.claim))
    delivered.run.adopt = delivered.adopted
    return delivered.run


def resume_own_claim(delivered: DeliveredMessage, row: Row) -> Run | None:
    """Go on with this delivery's own claim, whose answer was lost; return ``None`` if the row changed meanwhile."""
    note_original(delivered, row)
    run = delivered.run
    run.asked += min(row.lease_left - delivered.task.idempotency.lease, 0.0)  # it was asked for that much earlier
    if row.lease_left > 0:
        claimed: Run | None = start(delivered, Claimed(Claim(row.key, row.token)), row)
    else:
        claimed = take_over(delivered, row)
    if claimed is not None and row.processed_status is ProcessedStatus.SUCCESS:
        return replay_claimed(delivered, row)
    return claimed if claimed is None or delivered.done is None else _as_done(claimed, delivered.done)


def take_over(delivered: DeliveredMessage, row: Row) -> Run | None:
    """Take over a message whose owner's lease ran out; return ``None`` if its row changed meanwhile."""
    claimed = delivered.store.take_over(
        row,
        task_id=delivered.message.task_id,
        worker=worker_label(delivered.request.hostname),
        lease=delivered.task.idempotency.lease,
        attempt=delivered.message.attempt,
    )
    if claimed is None:
        return None
    note_original(delivered, row)
    logger.warning("%s is taken over from %s, whose lease ran out", delivered, row.worker)
    run = start(delivered, claimed, row)
    run.emit(OutcomeKind.TAKEN_OVER, row)
    return run


def settle(delivered: DeliveredMessage, row: Row, done: Done) -> Run | None:
    """Take over a message that was done, to send what waits on its result; return ``None`` if its row changed meanwhile.

    The result becomes its recovery point, so that it is replayed if this worker dies, too.
    """
    delivered.done = done  # also if the answer to the takeover is lost: then this delivery resumes its own claim
    claimed = take_over(delivered, row)
    return None if claimed is None else _as_done(claimed, done)


def _as_done(run: Run, done: Done) -> Run:
    held = run.commit(
        "note a recovery point",
        encode_result(run.task.app, done.value, trace=run.header.trace),
        lambda store, kept: store.checkpoint(run.held_claim, result=kept),
        run.has_succeeded,
    )
    if not held:
        run.lose()
    run.move_to(run_state.Checkpointed(run.held_claim, done.value))
    return run


def abandon(delivered: DeliveredMessage, row: Row) -> None:
    """Fail a message whose owner's lease ran out, unless its row changed.

    Raises:
        AlreadyFailedError: This delivery ended the message.
    """
    record_original(delivered)
    run = delivered.run
    if delivered.store.abandon(row, error=ABANDONED, unique_for=delivered.task.idempotency.unique_for):
        run.move_to(run_state.Finished(run.claim))
        run.attach()  # this delivery has ended the message: its handlers are called
        run.emit(OutcomeKind.ABANDONED, row, reason="abandoned")
        raise AlreadyFailedError(row.key.message_id, ABANDONED)
