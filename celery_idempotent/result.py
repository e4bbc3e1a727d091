"""The result of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery.result import AsyncResult

    class IdempotentResult(AsyncResult[Any]):  # type: ignore[misc]
        """Celery's ``AsyncResult``, with whether the call was a duplicate.

        For type checkers only: at run time, the attribute is set on the app's own class of results.
        """

        #: Whether the message was sent before. The result is then the first call's, unless something else waits on this call.
        duplicate: bool
