"""Act on a call whose id is taken: return or raise what its row calls for, or publish it again or as a copy."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, assert_never

from celery_idempotent.core.decision import Call, CallAction, decide_call
from celery_idempotent.core.records import Row
from celery_idempotent.errors import DuplicateMessageError, MessageMismatchError, StoreUnavailableError
from celery_idempotent.hooks import OutcomeKind
from celery_idempotent.message.header import later_call
from celery_idempotent.producer.answers import answer_again, differs, eager_result, note_skipped
from celery_idempotent.producer.guarded import GuardedRun, current_run
from celery_idempotent.producer.publishing import Publishing

if TYPE_CHECKING:
    from celery.result import AsyncResult

__all__ = ["answer_duplicate"]

logger = logging.getLogger("celery_idempotent")


def answer_duplicate(call: Publishing, row: Row) -> AsyncResult[Any] | None:
    """Carry out the decision on the row found; return ``None`` if the row changed or is free again: record anew.

    Raises:
        DuplicateMessageError: The task's options ask for this error.
        MessageMismatchError: The row has other arguments.
    """
    prepared = call.prepared
    action = decide_call(row, _call_against(call, row), call.task.idempotency.call)
    match action:
        case CallAction.RECORD:
            return None
        case CallAction.RETURN_FIRST:
            _count_duplicate(call)
            call.emit(OutcomeKind.DUPLICATE, row, action)
            return _first_result(call, row)
        case CallAction.RAISE_DUPLICATE:
            _count_duplicate(call)
            call.emit(OutcomeKind.DUPLICATE, row, action)
            raise DuplicateMessageError(row.key.message_id, row.task_id, str(row.status))
        case CallAction.RAISE_MISMATCH:
            if prepared.dispatched:
                return call.publish(duplicate=True)  # its consumer raises the error, under its own task id
            call.emit(OutcomeKind.MISMATCHED, row, action)
            differing = differs(call.task, row, prepared.args, prepared.kwargs)
            raise MessageMismatchError(row.key.message_id, row.key.task_name, differing)
        case CallAction.PUBLISH_COPY:
            return _publish_copy(call, row)
        case CallAction.PUBLISH_AGAIN:
            # After a lost answer, the new publication time may be this call's own: publish, since an extra copy does no harm.
            # An outbox does not touch the row before the commit.
            if (
                call.box is None
                and not call.ask(partial(call.store.republish, row))
                and not call.request.outcome_unknown
            ):
                return None
            logger.warning("%s is published again: it has waited since %s", call, row.waiting_since)
            call.emit(OutcomeKind.DUPLICATE, row, action)
            return call.publish(replace(prepared.header, task_id=row.task_id), duplicate=True)
        case CallAction.RESUBMIT:
            if not call.ask(partial(call.store.resubmit, row, call.message)):
                return None
            return call.publish_or(
                partial(_take_back_resubmission, call, row), partial(call.emit, OutcomeKind.RECORDED, row, action)
            )
        case CallAction.TRANSITION:  # pragma: no cover - decided before the store is asked
            raise AssertionError("a run's own message is sent on without a check")
        case _:  # pragma: no cover - the type checker proves it away
            assert_never(action)


def _call_against(call: Publishing, row: Row) -> Call:
    """Return the call, marked if the row is its own from an earlier run of the body: the first message then has its callbacks."""
    decided = call.prepared.call
    if call.prepared.place is None:
        return decided
    position = call.prepared.place.position
    same = row.task_id == call.message.task_id == position.task_id
    repeated = same or row.key.message_id == position.message_id
    return replace(decided, repeated=repeated, canvas=decided.canvas and not same)


def _take_back_resubmission(call: Publishing, row: Row) -> None:
    call.store.cancel(
        row.key,
        task_id=call.message.task_id,
        error=row.error or "failed",
        unique_for=call.task.idempotency.unique_for,
    )


def _first_result(call: Publishing, row: Row) -> AsyncResult[Any]:
    note_skipped(row, call.message.task_id)
    if call.task.app.conf.task_always_eager:
        call.task.queue_log.warn_of_eager_call()
        return call.in_trail(eager_result(call.task, row))
    answer_again(call.task, row)
    return call.in_trail(call.result(row.task_id, duplicate=True))


def _count_duplicate(call: Publishing) -> None:
    if call.box is not None:
        call.box.count(call.task.queue_log, call.message.key)
        return
    try:
        call.store.count_duplicate(call.message.key)
    except StoreUnavailableError as error:
        logger.warning("a duplicate of %s was not counted: %s", call, error)


# -- copies ------------------------------------------------------------------------------------------------------------


def _publish_copy(call: Publishing, row: Row) -> AsyncResult[Any]:
    """Publish the call under its own task id, with its own row until its consumer has answered it."""
    header = call.prepared.header.copy_of(row.task_id, _later_call(call, row))
    own = header.row_of_its_own
    emit = partial(call.emit, OutcomeKind.DUPLICATE, row, CallAction.PUBLISH_COPY)
    if own == call.message.key or call.task.app.conf.task_always_eager or call.prepared.is_broadcast:
        emit()
        return call.publish(replace(header, copied=False), duplicate=True)
    call.ask(partial(call.store.record, replace(call.message, key=own)))
    return call.publish_or(partial(call.store.withdraw, own, task_id=call.message.task_id), emit, header)


def _later_call(call: Publishing, row: Row) -> str | None:
    """Return a name for a later call under a Celery id sent before; ``None`` if it may be the same call again.

    A signature that was frozen, or given a task id, may be part of several canvases. When a task sends it on, it is a later call
    unless that task, or the run it replays, may have sent it already.
    """
    prepared, task_id = call.prepared, call.message.task_id
    if task_id not in (row.task_id, row.ran_task_id) or prepared.place is not None or prepared.run is not None:
        return None
    parent = current_run(call.task.app)
    if parent is not None:
        if not prepared.dispatched or _is_repeated(call, parent):
            return None
        return parent.later_call(task_id)
    # A task without the guard may run again and repeat the call.
    return None if call.task.app.current_worker_task else later_call()


def _is_repeated(call: Publishing, parent: GuardedRun) -> bool:
    """Return whether a later call was redelivered after it was answered, so that it repeats its calls.

    If it was killed before that, it sends some of its calls as later ones again, and they are replayed. The row's age cannot tell them
    from another call's: two calls under one Celery id may be under way at once.
    """
    if parent.header.call is None or parent.request.is_eager:
        return False
    return call.store.find(parent.header.row_of_its_own) is None
