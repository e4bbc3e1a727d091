"""Say on the result of a call which message it is of, and whether that was sent before."""

from __future__ import annotations

from typing import TypeVar

from celery.result import AsyncResult

__all__ = ["marked"]

Result = TypeVar("Result", bound=AsyncResult)


def marked(result: Result, message_id: str, *, duplicate: bool | None) -> Result:
    """Return the result, marked.

    Args:
        result: Celery's, or an eager one.
        message_id: The message's id.
        duplicate: Whether the message was sent before; ``None`` if it is not known yet.
    """
    result.message_id, result.duplicate = message_id, duplicate
    return result
