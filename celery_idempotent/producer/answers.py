"""What the caller of a duplicate gets: the first call's result, from its row where the result backend has none."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from celery import states
from celery.result import EagerResult

from celery_idempotent.core.decision import Call, CallAction, decide_call
from celery_idempotent.core.records import MessageKey, ProcessedStatus, Row, Status
from celery_idempotent.errors import AlreadyFailedError, ConfigurationError, DuplicateMessageError, StoreError
from celery_idempotent.hooks import OutcomeKind
from celery_idempotent.message.serialization import UndecodableError, decode_message, decode_result
from celery_idempotent.producer.call_options import is_waited_on

if TYPE_CHECKING:
    from celery_idempotent.producer.guarded import Guarded

__all__ = ["answer_again", "answer_of", "differs", "eager_result"]

logger = logging.getLogger("celery_idempotent")


def answer_of(
    task: Guarded, key: MessageKey, fingerprint: str | None, task_id: str, options: Mapping[str, Any]
) -> EagerResult[Any] | None:
    """Return what ``apply()`` answers for a message that has succeeded; ``None`` when the call is to go the way of a delivery.

    Raises:
        DuplicateMessageError: The task says so.
    """
    if is_waited_on(task_id, options):
        return None
    store = task.queue_log.store
    try:
        row = store.find(key)
    except StoreError:
        return None  # what becomes of it then is decided where it is claimed
    if row is None or row.status is not Status.DONE or row.processed_status is not ProcessedStatus.SUCCESS:
        return None
    action = decide_call(row, Call(fingerprint), task.idempotency.call)
    if action not in (CallAction.RETURN_FIRST, CallAction.RAISE_DUPLICATE):
        return None
    store.count_duplicate(key)
    task.queue_log.outcomes.emit(OutcomeKind.DUPLICATE, key, row=row, task_id=task_id, attempt=0, reason=action)
    if action is CallAction.RAISE_DUPLICATE:
        raise DuplicateMessageError(key.message_id, row.task_id, str(row.status))
    return eager_result(task, row)


def differs(task: Guarded, row: Row, args: Any, kwargs: Any) -> str | None:
    """Name the arguments of a call that are not those of the row's message; ``None`` if the row has none any more, or it cannot be told."""
    try:
        first_args, first_kwargs, _ = decode_message(task.app, row.message)
        names = task.idempotency.signature.difference((first_args, first_kwargs), (args, kwargs))
    except (UndecodableError, ConfigurationError, TypeError):
        return None
    return ", ".join(names) or None


def eager_result(task: Guarded, row: Row) -> EagerResult[Any]:
    """Return the outcome of a message in the hands of an eager caller, from its row."""
    if row.processed_status is ProcessedStatus.SUCCESS:
        result = EagerResult(row.task_id, _stored_value(task, row), states.SUCCESS, name=task.name)
    elif row.processed_status is ProcessedStatus.FAILURE:
        error = AlreadyFailedError(row.key.message_id, row.error)
        result = EagerResult(row.task_id, error, states.FAILURE, name=task.name)
    else:
        # The caller of a body that has not ended: only a call from inside of it, or from another thread.
        result = EagerResult(row.task_id, None, states.PENDING, name=task.name)
    result.duplicate = True
    return result


def _stored_value(task: Guarded, row: Row) -> Any:
    try:
        return None if row.result is None else decode_result(task.app, row.result)
    except UndecodableError as error:
        logger.warning("the stored result of %s cannot be read: %s", row.key, error)
        return None


def answer_again(task: Guarded, row: Row) -> None:
    """Store the outcome of a message once more whose result has expired in the backend, where its row outlives it.

    The caller of a duplicate would wait for it for ever.
    """
    backend, processed = task.backend, row.processed_timestamp
    if row.status is not Status.DONE or processed is None or task.ignore_result or not backend.persistent:
        return
    if not backend.expires or (row.read_at - processed).total_seconds() < backend.expires:
        return
    try:
        if backend.get_state(row.task_id) in states.READY_STATES:
            return
        if row.processed_status is ProcessedStatus.FAILURE:
            error = AlreadyFailedError(row.key.message_id, row.error)
            backend.store_result(row.task_id, error, states.FAILURE)
        elif row.result is not None:  # or nothing was kept, or another task answers
            backend.store_result(row.task_id, decode_result(task.app, row.result), states.SUCCESS)
    except Exception as error:  # noqa: BLE001 - the call is a duplicate and needs no backend: its result is asked for later
        logger.warning("the result of %s has expired, and is not stored again: %r", row.key, error)
