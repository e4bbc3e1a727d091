"""Replay a finished message for its copy: its result, from the queue log or the result backend, or its error."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from celery import states
from celery.backends.base import DisabledBackend
from celery.exceptions import Ignore, SoftTimeLimitExceeded
from kombu.exceptions import ContentDisallowed, DecodeError

from celery_idempotent.core import store_retry
from celery_idempotent.core.records import NoResultReason, Row
from celery_idempotent.errors import AlreadyFailedError, IdempotentError
from celery_idempotent.hooks import OutcomeKind
from celery_idempotent.message.serialization import UndecodableError, decode_result
from celery_idempotent.worker.delivered_message import DeliveredMessage
from celery_idempotent.worker.delivery import describe
from celery_idempotent.worker.hold import SETTLE, hold
from celery_idempotent.worker.late_retry import OWN_RESULT_WITHIN
from celery_idempotent.worker.run import Run
from celery_idempotent.worker.run_state import Checkpointed, Replayed

__all__ = ["replay", "replay_claimed", "replay_error", "result_is_ready"]

logger = logging.getLogger("celery_idempotent")

#: How long after its row says failure a failed attempt may take to store its error.
_OWN_RESULT_WITHIN = timedelta(seconds=OWN_RESULT_WITHIN)

_NOTHING = object()


def replay(delivered: DeliveredMessage, row: Row) -> Run:
    """Return a run that replays a message that is done."""
    value = _stored_value(delivered, row)
    if value is _NOTHING:
        value = _first_result(delivered, row)
    delivered.store.count_duplicate(row.key)
    delivered.run.move_to(Replayed(value))
    delivered.run.emit(OutcomeKind.REPLAYED, row)
    return delivered.run


def replay_claimed(delivered: DeliveredMessage, row: Row) -> Run:
    """Return a run that replays a recovery point, whose claim it has, and ends it after its callbacks.

    Raises:
        AlreadyFailedError: The result was not kept. The message has failed.
    """
    run = delivered.run
    claim, value = run.claim, _stored_value(delivered, row)
    assert claim is not None, "a recovery point is replayed by its owner"
    if value is _NOTHING:
        # The body has taken effect, so it must not run again.
        error = "abandoned: its result could not be kept, so what waits on it cannot be served"
        if delivered.store.fail(claim, error=error, unique_for=delivered.task.idempotency.unique_for):
            run.emit(OutcomeKind.ABANDONED, row, reason="abandoned")
        raise AlreadyFailedError(row.key.message_id, error)
    run.move_to(Checkpointed(claim, value))
    run.emit(OutcomeKind.REPLAYED, row)
    return run


def replay_error(delivered: DeliveredMessage, row: Row) -> BaseException:
    """Return the error for a copy of a failed message: the stored one, if it ran under the copy's own Celery id.

    Raises:
        Ignore: That error may not be stored yet, and the copy must not overwrite it. The copy comes again.
    """
    error = _first_error(delivered, row)
    delivered.store.count_duplicate(row.key)
    delivered.run.emit(OutcomeKind.REPLAYED, row, reason="failure")
    return error


def result_is_ready(delivered: DeliveredMessage) -> bool:
    """Return whether the result backend has the final result of the delivery's own Celery id."""
    if not _backend_tells(delivered):
        return False
    with _asking_the_backend(delivered):
        return bool(delivered.task.backend.get_state(delivered.request.id) in states.READY_STATES)


def _first_error(delivered: DeliveredMessage, row: Row) -> BaseException:
    task, request = delivered.task, delivered.request
    if row.ran_task_id == request.id and _backend_tells(delivered):
        if result_is_ready(delivered):
            with _asking_the_backend(delivered):
                stored = task.AsyncResult(request.id).result
            if isinstance(stored, Exception):
                return stored
        elif row.processed_timestamp and row.read_at - row.processed_timestamp < _OWN_RESULT_WITHIN:
            raise hold(delivered, SETTLE, row)
    return AlreadyFailedError(row.key.message_id, row.error)


def _first_result(delivered: DeliveredMessage, row: Row) -> Any:
    """Return the result backend's result for the id under which the body ran; for when the queue log kept none."""
    first = delivered.task.AsyncResult(row.ran_task_id or row.task_id)
    with _asking_the_backend(delivered):
        _ = first.state  # cached once it is final
    if first.state == states.SUCCESS:
        return first.result
    if first.state in states.READY_STATES:
        raise AlreadyFailedError(row.key.message_id, describe(first.result))
    if row.error == NoResultReason.REPLACED and not delivered.request.is_eager:
        # The task that replaced it has not answered yet.
        raise hold(delivered, delivered.task.idempotency.lease / 2)
    logger.warning("%s is replayed as None: its result was not kept, and the backend has none", delivered)
    return None


def _stored_value(delivered: DeliveredMessage, row: Row) -> Any:
    if row.result is None:
        return _NOTHING
    try:
        return decode_result(delivered.task.app, row.result)
    except UndecodableError as error:
        logger.warning("the stored result of %s cannot be read: %s", delivered, error)
        return _NOTHING


def _backend_tells(delivered: DeliveredMessage) -> bool:
    """Return whether the result backend can say how this Celery id ended."""
    # An eager run has no stored result; rpc:// keeps results in the caller's queue, which a worker cannot read.
    backend = delivered.task.backend
    return not delivered.request.is_eager and bool(backend.persistent) and not isinstance(backend, DisabledBackend)


@contextmanager
def _asking_the_backend(delivered: DeliveredMessage) -> Iterator[None]:
    """Hold the message while the result backend gives no answer, as for the store.

    An error here would fail the message outside of its body. Each backend's client has its own error classes, so catch any.
    """
    try:
        yield
    except (Ignore, IdempotentError, DecodeError, ContentDisallowed, SoftTimeLimitExceeded):
        raise
    except Exception as error:
        if delivered.request.is_eager:
            raise
        logger.error(
            "%s is delivered again in %.0f s, the result backend gives no answer: %r",
            delivered,
            store_retry.REDELIVER_AFTER,
            error,
        )
        raise hold(delivered, store_retry.REDELIVER_AFTER) from error
