"""Answer the caller of a duplicate with the first call's result; from its row, if the result backend has none."""

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
from celery_idempotent.producer.marked import marked

if TYPE_CHECKING:
    from celery_idempotent.producer.guarded import Guarded

__all__ = ["answer_again", "answer_of", "differs", "eager_result", "note_skipped"]

logger = logging.getLogger("celery_idempotent")


def answer_of(
    task: Guarded, key: MessageKey, fingerprint: str | None, task_id: str, options: Mapping[str, Any]
) -> EagerResult[Any] | None:
    """Return the answer of ``apply()`` for a message that has succeeded; ``None`` if the call must be handled as a delivery.

    Raises:
        DuplicateMessageError: The task has ``on_duplicate="raise"``.
    """
    if is_waited_on(task_id, options):
        return None
    store = task.queue_log.store
    try:
        row = store.find(key)
    except StoreError:
        return None  # the claim will meet the same outage, and handles it
    if row is None or row.status is not Status.DONE or row.processed_status is not ProcessedStatus.SUCCESS:
        return None
    action = decide_call(row, Call(fingerprint), task.idempotency.call)
    if action not in (CallAction.RETURN_FIRST, CallAction.RAISE_DUPLICATE):
        return None
    store.count_duplicate(key)
    task.queue_log.hooks.emit(OutcomeKind.DUPLICATE, key, row=row, task_id=task_id, attempt=0, reason=action)
    if action is CallAction.RAISE_DUPLICATE:
        raise DuplicateMessageError(key.message_id, row.task_id, str(row.status))
    note_skipped(row, task_id)
    return eager_result(task, row)


def note_skipped(row: Row, task_id: str) -> None:
    """Log that a call was not sent, because its message was sent before.

    Args:
        row: The message's row.
        task_id: The Celery id that the call would have had.
    """
    logger.info(
        "%s is skipped, as a call under %s: it was sent before as %s, and is %s",
        row.key,
        task_id,
        row.task_id,
        row.status,
    )


def differs(task: Guarded, row: Row, args: Any, kwargs: Any) -> str | None:
    """Name the arguments of a call that are not those of the row's message; ``None`` if the row has none any more, or it cannot be told."""
    try:
        first_args, first_kwargs, _ = decode_message(task.app, row.message)
        names = task.idempotency.signature.difference((first_args, first_kwargs), (args, kwargs))
    except (UndecodableError, ConfigurationError, TypeError):
        return None
    return ", ".join(names) or None


def eager_result(task: Guarded, row: Row) -> EagerResult[Any]:
    """Return the outcome of a message for an eager caller, from its row."""
    if row.processed_status is ProcessedStatus.SUCCESS:
        result = EagerResult(row.task_id, _stored_value(task, row), states.SUCCESS, name=task.name)
    elif row.processed_status is ProcessedStatus.FAILURE:
        error = AlreadyFailedError(row.key.message_id, row.error)
        result = EagerResult(row.task_id, error, states.FAILURE, name=task.name)
    else:
        # The body has not ended yet: the call comes from inside it, or from another thread.
        result = EagerResult(row.task_id, None, states.PENDING, name=task.name)
    return marked(result, row.key.message_id, duplicate=True)


def _stored_value(task: Guarded, row: Row) -> Any:
    try:
        return None if row.result is None else decode_result(task.app, row.result)
    except UndecodableError as error:
        logger.warning("cannot read the stored result of %s: %s", row.key, error)
        return None


def answer_again(task: Guarded, row: Row) -> None:
    """Store a message's outcome in the result backend again if it has expired there.

    The row may outlive the result, and the caller of a duplicate would then wait for ever.
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
        elif row.result is not None:  # otherwise no result was kept, or another task gives the answer
            backend.store_result(row.task_id, decode_result(task.app, row.result), states.SUCCESS)
    except Exception as error:  # noqa: BLE001 - a duplicate call must not fail with the backend: its result is read later
        logger.warning("the result of %s has expired and could not be stored again: %r", row.key, error)
