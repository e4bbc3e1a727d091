"""Apply the decision about a delivery that was not granted its claim: gather its facts, decide, and act on the row."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import assert_never

from celery.backends.base import DisabledBackend

from celery_idempotent.core.abandoned import Done
from celery_idempotent.core.decision import Delivery, DeliveryAction, decide_delivery
from celery_idempotent.core.records import ABANDONED, ProcessedStatus, Row, Status
from celery_idempotent.errors import AlreadyProcessingError, MessageMismatchError
from celery_idempotent.hooks import OutcomeKind, reason_of
from celery_idempotent.message.canvas_ids import unsent_errbacks
from celery_idempotent.worker.ask_task import ask_task
from celery_idempotent.worker.celery_versions import ignores_result
from celery_idempotent.worker.chords import claimed_for
from celery_idempotent.worker.delivered_message import DeliveredMessage
from celery_idempotent.worker.delivery import answered, waited_on
from celery_idempotent.worker.events import DuplicateIgnored
from celery_idempotent.worker.hold import hold, hold_while_it_runs
from celery_idempotent.worker.replay import replay, replay_claimed, replay_error, result_is_ready
from celery_idempotent.worker.run import Run
from celery_idempotent.worker.take_over import abandon, settle, take_over

__all__ = ["apply_decision"]

logger = logging.getLogger("celery_idempotent")


def apply_decision(delivered: DeliveredMessage, row: Row) -> Run | None:
    """Carry out the decision on the row found; return ``None`` if the row changed or is to be claimed: ask again."""
    task, request, run, store = delivered.task, delivered.request, delivered.run, delivered.store
    if row.task_id == request.id and row.ran_task_id not in (None, request.id):
        # A copy has run, or runs, in place of this first message, and recorded it: see `record_original`.
        delivered.mark(copied=True)
    decision = decide_delivery(row, _facts(delivered, row), task.idempotency.delivery)
    match decision.action:
        case DeliveryAction.REFUSE:  # pragma: no cover - decided before the row was read: see `admit`
            raise AssertionError(decision)
        case DeliveryAction.CLAIM:
            if row.status is Status.PENDING:
                attempt = max(row.attempt, request.retries or 0)
                delivered.message = replace(delivered.message, attempt=attempt)
            elif row.rejected_before is not None:
                # Back from a dead-letter queue: make it pending, so that the next attempt claims it.
                store.resubmit(row, delivered.adopted())
            return None
        case DeliveryAction.HOLD:
            raise hold_while_it_runs(delivered, row, decision.delay)
        case DeliveryAction.TAKE_OVER:
            return take_over(delivered, row)
        case DeliveryAction.ASK:
            return _do_as_the_task_says(delivered, row)
        case DeliveryAction.TAKE_OVER_AND_REPLAY:
            _wait_for_the_chord(delivered)
            return None if take_over(delivered, row) is None else replay_claimed(delivered, row)
        case DeliveryAction.ABANDON:
            abandon(delivered, row)
        case DeliveryAction.CANCEL:
            # An earlier delivery was discarded while the owner lived; the owner has died since.
            if store.abandon(row, error=row.error or ABANDONED, unique_for=task.idempotency.unique_for):
                run.emit(OutcomeKind.CANCELLED, row, reason=reason_of(row.error or ABANDONED))
        case DeliveryAction.SKIP:
            store.count_duplicate(row.key)
            answered(task, request)
            logger.info("%s is skipped: it is %s already", run, row.status)
            run.emit(OutcomeKind.SKIPPED, row)
            running = row.status is not Status.DONE and delivered.is_of(row)
            raise DuplicateIgnored(f"{run} is a duplicate: it is {row.status}", row.key, "skipped", running)
        case DeliveryAction.REPLAY:
            _wait_for_the_chord(delivered)
            return replay(delivered, row)
        case DeliveryAction.RAISE_FAILED:
            raise replay_error(delivered, row)
        case DeliveryAction.RAISE_PROCESSING:
            store.count_duplicate(row.key)
            run.emit(OutcomeKind.SKIPPED, row, reason="raise_processing")
            raise AlreadyProcessingError(row.key.message_id, decision.delay)
        case DeliveryAction.RAISE_MISMATCH:
            run.emit(OutcomeKind.MISMATCHED, row)
            raise MessageMismatchError(row.key.message_id, row.key.task_name)
        case DeliveryAction.FORBID:  # pragma: no cover - what is discarded does not come here
            raise AssertionError("a delivery that is discarded reaches no task")
        case _:  # pragma: no cover - the type checker proves it away
            assert_never(decision.action)
    return None


def _do_as_the_task_says(delivered: DeliveredMessage, row: Row) -> Run | None:
    """Carry out what the task answers about a message whose owner's lease ran out; return ``None`` as above."""
    match ask_task(delivered, row):
        case "rerun":
            return take_over(delivered, row)
        case "fail":
            abandon(delivered, row)
            return None
        case Done() as done:
            _wait_for_the_chord(delivered)
            return settle(delivered, row, done)


def _wait_for_the_chord(delivered: DeliveredMessage) -> None:
    """Hold the message while another worker, even one that died, still has the claim to send its chord's body."""
    seconds = 0.0 if delivered.request.is_eager else claimed_for(delivered.task, delivered.request)
    if seconds:
        raise hold(delivered, seconds)


# -- the input of the decision -----------------------------------------------------------------------------------------


def _facts(delivered: DeliveredMessage, row: Row) -> Delivery:
    task, request, header = delivered.task, delivered.request, delivered.header
    awaited = not ignores_result(task, request) and not isinstance(task.backend, DisabledBackend)
    failed = row.status is Status.DONE and row.processed_status is ProcessedStatus.FAILURE
    return Delivery(
        task_id=delivered.message.task_id,
        retries=request.retries or 0,
        original_task_id=delivered.message.original_task_id,
        fingerprint=delivered.message.fingerprint,
        rejected=header.rejected,
        awaited=awaited,
        canvas=waited_on(request),
        result_ready=awaited
        and row.status is Status.DONE
        and result_is_ready(delivered)
        and not _has_callbacks_pending(delivered, failed),
        callbacks_pending=failed and unsent_errbacks(task.app, request, delivered.store),
        later=_is_later(delivered),
    )


def _is_later(delivered: DeliveredMessage) -> bool:
    """Return whether this is a later call under its Celery id, not answered yet. Once answered, it is a copy like any other."""
    if delivered.header.call is None:
        return False
    return bool(delivered.request.is_eager) or delivered.store.find(delivered.header.row_of_its_own) is not None


def _has_callbacks_pending(delivered: DeliveredMessage, failed: bool) -> bool:
    """Return whether this copy's callbacks may still be unsent: its result is stored before they are."""
    request, header = delivered.request, delivered.header
    waits = waited_on(request) or (failed and bool(request.errbacks))
    return header.copied and waits and delivered.store.find(header.row_of_its_own) is not None
