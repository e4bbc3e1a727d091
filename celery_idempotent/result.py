"""The result of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery.result import AsyncResult, EagerResult

    class IdempotentResult(AsyncResult[Any]):  # type: ignore[misc]
        """Celery's ``AsyncResult``, with the message's id and whether the call was a duplicate.

        For type checkers only: at run time, the attributes are set on the app's own class of results. They belong to the object that the
        call has returned. Pickled, or made anew by its Celery id, a result has neither.
        """

        #: The id of the message that the call is: given, made by the task's option, or the Celery id that it was sent under.
        message_id: str

        #: Whether the message was sent before. The result is then the first call's, unless something else waits on this call.
        duplicate: bool

    class IdempotentEagerResult(EagerResult[Any]):  # type: ignore[misc]
        """Celery's ``EagerResult``, with the same."""

        #: As for an :class:`IdempotentResult`.
        message_id: str

        #: As for an :class:`IdempotentResult`.
        duplicate: bool
