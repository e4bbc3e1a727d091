"""Send a call: record it, then publish it, once per message id."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from celery_idempotent.core.records import Duplicate, Inserted, Row, Status
from celery_idempotent.core.transactions import with_transactions
from celery_idempotent.errors import StoreError, StoreUnavailableError
from celery_idempotent.hooks import OutcomeKind
from celery_idempotent.producer.box import Outbox
from celery_idempotent.producer.duplicate_call import answer_duplicate
from celery_idempotent.producer.guarded import Guarded
from celery_idempotent.producer.own_message import forward_own_message
from celery_idempotent.producer.prepared import PreparedCall
from celery_idempotent.producer.publishing import Publishing
from celery_idempotent.producer.unrecorded import is_unrecorded, send_unrecorded

if TYPE_CHECKING:
    from celery.result import AsyncResult


__all__ = ["Sending", "send"]

logger = logging.getLogger("celery_idempotent")


def send(task: Guarded, args: Any, kwargs: Any, task_id: str | None, options: dict[str, Any]) -> AsyncResult[Any]:
    """Send a call at most once under its message id.

    Args:
        task: The task to call.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        task_id: The Celery id the caller chose, if any.
        options: The other arguments of ``apply_async``.

    Returns:
        The message's AsyncResult, with ``duplicate`` set.

    Raises:
        ConfigurationError: The task is atomic and the store has no transactions, so no worker could run it.
        DuplicateMessageError: It was sent before, and the task's options ask for this error.
        MessageMismatchError: The id is known with other arguments.
        StoreUnavailableError: The store gave no answer and the call was not sent.

    Atomicity: of N concurrent calls one records and publishes. A crash between the two leaves a pending row. A later call
    of the same id publishes it again once it is older than ``idempotent_lost_after``.
    """
    if is_unrecorded(task):
        return send_unrecorded(task, args, kwargs, task_id, options)
    if task.idempotency.atomic:
        with_transactions(task.queue_log.store)
    return Sending(PreparedCall.of(task, args, kwargs, task_id, options)).send()


class Sending(Publishing):
    """One prepared call: its record, and what the store's answer to it calls for.

    Args:
        prepared: The call.
    """

    def __init__(self, prepared: PreparedCall) -> None:
        super().__init__(prepared)
        #: The outcome to report if the message is inserted.
        self.recorded = OutcomeKind.RECORDED

    def send(self) -> AsyncResult[Any]:
        """Send the call; see :func:`send`."""
        try:
            return self._send()
        except BaseException:
            if (place := self.prepared.place) is not None:
                place.calls.take_back(place.position)
            raise

    def _send(self) -> AsyncResult[Any]:
        if self.prepared.call.own:
            return forward_own_message(self)
        if self.box is not None:
            return self.box.take(self)
        try:
            return self.resolve(self._record())
        except StoreUnavailableError as error:
            if self.task.queue_log.settings.on_store_error != "run":
                raise
            logger.error("%s is sent unguarded, the store gives no answer: %s", self, error)
            result = self.publish()
            self.emit(OutcomeKind.UNGUARDED)
            return result

    def _record(self) -> Inserted | Duplicate:
        began = time.monotonic()
        answer: Inserted | Duplicate = self.ask(partial(self.store.record, self.message))
        self.seconds = time.monotonic() - began
        return answer

    def resolve(self, answer: Inserted | Duplicate) -> AsyncResult[Any]:
        """Publish what was recorded, or act on the row that was found; return the call's result.

        Raises:
            DuplicateMessageError: It was found, and the task's options ask for this error.
            MessageMismatchError: It was found with other arguments.
        """
        while True:
            if not isinstance(answer, Duplicate) or (self.request.outcome_unknown and self._is_mine(answer.row)):
                return self.publish_or(self._withdraw, partial(self.emit, self.recorded))
            result = answer_duplicate(self, answer.row)
            if result is not None:
                return result
            # The row changed between the statement and the decision: ask again.
            answer = self._record()

    # -- in an outbox --------------------------------------------------------------------------------------------------

    def record_in(self, box: Outbox) -> AsyncResult[Any]:
        """Record the call in an outbox's transaction; return its result."""
        self.box = box
        return self.resolve(self._record())

    def promised(self) -> AsyncResult[Any]:
        """Return the result of a call that is recorded later; ``duplicate`` is ``None``, because it is not known yet."""
        return self.in_trail(self.result(self.message.task_id, duplicate=None))

    def record_together(self, calls: Sequence[Sending]) -> list[Inserted | Duplicate]:
        """Record these calls of one app, in as few statements as possible.

        Raises:
            StoreUnavailableError: The store gave no answer, and the app does not have ``idempotent_on_store_error="run"``.
        """
        began = time.monotonic()
        try:
            answers: list[Inserted | Duplicate] = self.ask(
                partial(self.store.record_all, [call.message for call in calls])
            )
        except StoreUnavailableError as error:
            if self.task.queue_log.settings.on_store_error != "run":
                raise
            logger.error("%d calls are sent unguarded, the store gives no answer: %s", len(calls), error)
            for call in calls:
                call.recorded = OutcomeKind.UNGUARDED
            return [Inserted()] * len(calls)
        seconds = time.monotonic() - began
        for call in calls:
            call.request.outcome_unknown, call.seconds = self.request.outcome_unknown, seconds
        return answers

    def taken_back(self) -> bool:
        """Withdraw the call if it was recorded and not published; return whether the store confirmed it."""
        try:
            self._withdraw()
        except StoreError as error:
            logger.warning("%s may have been recorded, and is not taken back: %s", self, error)
            return False
        return True

    def _is_mine(self, row: Row) -> bool:
        """Return whether this call wrote the row, without getting the answer: it is not published yet."""
        return row.status is Status.PENDING and row.worker is None and row.task_id == self.message.task_id

    def _withdraw(self) -> None:
        self.store.withdraw(self.message.key, task_id=self.message.task_id)
