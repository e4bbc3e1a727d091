"""What a call returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery.result import AsyncResult

    class IdempotentResult(AsyncResult[Any]):  # type: ignore[misc]
        """Celery's ``AsyncResult``, as the app makes it, and whether the call was a duplicate.

        For type checkers only: at run time the attribute is set on whatever class of results the app has.
        """

        #: Whether the message was sent before; the result is then the first one's, unless something else waits on this call.
        duplicate: bool
