"""Tell from a row whether the first attempt of a verb took effect.

A connection can break after the server has written and before its answer arrives. The store then repeats the verb, which finds nothing
left to change. If the row stands as the first attempt would have left it, the verb answers as that attempt would have.
"""

from __future__ import annotations

from celery_idempotent.core.records import FORGOTTEN, Claim, Holder, NewMessage, ProcessedStatus, Row, Status
from celery_idempotent.core.storable import in_ascii, storable_error

__all__ = [
    "abandon",
    "cancel",
    "claim",
    "complete",
    "fail",
    "forget",
    "held_by",
    "record",
    "release",
    "republish",
    "resubmit",
    "retry",
    "take_over",
    "withdraw",
]


def record(row: Row, message: NewMessage) -> bool:
    """Return whether the message is pending and was never claimed."""
    return row.status is Status.PENDING and row.worker is None and row.task_id == message.task_id


def withdraw(row: Row | None, *, task_id: str) -> bool:
    """Return whether the row is gone, or its id free again."""
    return row is None or (row.status is Status.DONE and row.expired and row.task_id == task_id)


def resubmit(row: Row, before: Row, message: NewMessage) -> bool:
    """Return whether the message is pending again."""
    return record(row, message) and row.token == before.token


def republish(row: Row, before: Row) -> bool:
    """Return whether the row may have been published by this call.

    Another call may have published it. The claim absorbs a second publication, but a message that is never published is lost.
    """
    return (row.status, row.token) == (before.status, before.token)


def claim(row: Row, *, worker: str) -> bool:
    """Return whether the worker holds the message."""
    return row.status is Status.PROCESSING and row.worker == worker


def take_over(row: Row, before: Row, *, worker: str) -> bool:
    """Return whether the worker holds the message by the next token."""
    return claim(row, worker=worker) and row.token == before.token + 1


def complete(row: Row, by: Claim) -> bool:
    """Return whether the message succeeded: no other run can complete it under this token."""
    return row.token == by.token and _ended(row, ProcessedStatus.SUCCESS)


def fail(row: Row, holder: Holder, *, error: str) -> bool:
    """Return whether the message failed with this error.

    Recovery may have abandoned it under the same token. The error tells the two apart.
    """
    return held_by(row, holder) and _failed(row, error)


def retry(row: Row, holder: Holder, message: NewMessage) -> bool:
    """Return whether the message waits for this attempt."""
    return release(row, holder) and row.attempt == message.attempt


def release(row: Row, holder: Holder) -> bool:
    """Return whether the message is pending again."""
    return held_by(row, holder) and row.status is Status.PENDING


def abandon(row: Row, before: Row, *, error: str) -> bool:
    """Return whether the message failed with this error, under the same token."""
    return row.token == before.token and _failed(row, error)


def cancel(row: Row, *, task_id: str, error: str) -> bool:
    """Return whether the message failed with this error."""
    return row.task_id == task_id and _failed(row, error)


def forget(row: Row, before: Row) -> bool:
    """Return whether the row was emptied."""
    return (row.token, row.task_id) == (before.token, before.task_id) and _failed(row, FORGOTTEN)


def held_by(row: Row, holder: Holder) -> bool:
    """Return whether the holder was the last to claim the row."""
    return row.token == holder.token if isinstance(holder, Claim) else row.worker == holder.worker


def _ended(row: Row, how: ProcessedStatus) -> bool:
    return row.status is Status.DONE and row.processed_status is how


def _failed(row: Row, error: str) -> bool:
    return _ended(row, ProcessedStatus.FAILURE) and row.error in {storable_error(error), in_ascii(error)}
