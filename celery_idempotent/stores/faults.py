"""Errors that both stores raise alike."""

from __future__ import annotations

from celery_idempotent.core.records import ProcessedStatus, Status
from celery_idempotent.errors import StoreError, StoreUnavailableError

__all__ = ["statuses_of", "unavailable"]


def unavailable(
    text: str, *, sent: bool, kind: type[StoreUnavailableError] = StoreUnavailableError
) -> StoreUnavailableError:
    """Return the error of a store that gave no answer.

    Args:
        text: What happened.
        sent: Whether what it was asked may have taken effect.
        kind: The error's class.
    """
    error = kind(text)
    error.unsent = not sent
    return error


def statuses_of(status: str, processed: str | None, *, of: tuple[str, ...]) -> tuple[Status, ProcessedStatus | None]:
    """Return both statuses of a row.

    Args:
        status: What stands in ``status``.
        processed: What stands in ``processed_status``.
        of: What the row is known by, for the error.

    Raises:
        StoreError: One is a word that this library does not write.
    """
    try:
        return Status(status), None if processed is None else ProcessedStatus(processed)
    except ValueError:
        raise StoreError(
            f"the queue log's row of {' and '.join(map(repr, of))} is damaged: status {status!r} and processed_status {processed!r} are "
            f"not among {', '.join(Status)} and {', '.join(ProcessedStatus)}; correct the row, or delete it"
        ) from None
