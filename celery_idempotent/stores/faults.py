"""Errors that both stores raise."""

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
        sent: Whether the request may have taken effect.
        kind: The error's class.
    """
    error = kind(text)
    error.unsent = not sent
    return error


def statuses_of(status: str, processed: str | None, *, of: tuple[str, ...]) -> tuple[Status, ProcessedStatus | None]:
    """Return both statuses of a row.

    Args:
        status: The text in ``status``.
        processed: The text in ``processed_status``.
        of: The row's key, for the error.

    Raises:
        StoreError: This library does not write such a status.
    """
    try:
        return Status(status), None if processed is None else ProcessedStatus(processed)
    except ValueError:
        raise StoreError(
            f"the queue log's row of {' and '.join(map(repr, of))} is damaged: status {status!r} and processed_status {processed!r} are "
            f"not among {', '.join(Status)} and {', '.join(ProcessedStatus)}; correct the row, or delete it"
        ) from None
