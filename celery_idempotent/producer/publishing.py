"""Publish one call, at once or through an outbox after its commit, and take its record back if that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from celery_idempotent.core.records import Row
from celery_idempotent.errors import StoreError
from celery_idempotent.hooks import OutcomeKind
from celery_idempotent.message.header import Header
from celery_idempotent.message.serialization import without_local
from celery_idempotent.producer.box import Outbox
from celery_idempotent.producer.broadcast import end_broadcast
from celery_idempotent.producer.call_options import expiring_in_workers, moment
from celery_idempotent.producer.marked import marked
from celery_idempotent.producer.prepared import PreparedCall
from celery_idempotent.producer.publisher import Outgoing
from celery_idempotent.producer.store_request import StoreRequest

if TYPE_CHECKING:
    from celery.result import AsyncResult

__all__ = ["Publishing"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")


class Publishing:
    """One prepared call on its way to the broker.

    Args:
        prepared: The call.
    """

    def __init__(self, prepared: PreparedCall) -> None:
        self.prepared = prepared
        self.task = prepared.task
        self.message = prepared.message
        #: The outbox that records the call and publishes it after the commit; ``None`` without one.
        self.box: Outbox | None = prepared.box
        self.request = StoreRequest(self.task, prepared.options)
        #: Seconds the store took to record the message, or to find it; ``None`` before that.
        self.seconds: float | None = None

    def __str__(self) -> str:
        return str(self.message.key)

    @property
    def store(self) -> Any:
        """The store, in the outbox's transaction if there is one."""
        return self.task.queue_log.store if self.box is None else self.box.store(self.task.queue_log)

    def ask(self, ask: Callable[[], T]) -> T:
        """Ask the store, with the retries that the call has; within a user's transaction without any."""
        if self.box is not None and self.box.joins:
            return ask()  # on an error, the transaction's owner decides
        return self.request.ask(ask)

    def emit(self, kind: OutcomeKind, row: Row | None = None, reason: str | None = None) -> None:
        """Report the call's outcome to the app's hooks, if any."""
        self.task.queue_log.hooks.emit(
            kind,
            self.message.key,
            row=row,
            task_id=self.message.task_id,
            queue=self.message.queue,
            attempt=self.message.attempt,
            reason=reason,
            store=self.seconds,
        )

    def publish(
        self,
        header: Header | None = None,
        *,
        duplicate: bool = False,
        emit: Callable[[], None] | None = None,
    ) -> AsyncResult[Any]:
        """Publish the call, or give it to the outbox; return its result.

        Args:
            header: The header to publish; by default the call's own.
            duplicate: Whether the id was sent before.
            emit: Reports the outcome after the publication.
        """
        header = header or self.prepared.header
        if self.box is not None:
            row = header.row_of_its_own if header.copied else header.key
            options = without_local(self.prepared.options)
            due = moment(self.task.app, options.pop("eta", None))
            self.box.add(Outgoing(row, self.task, self.prepared.args, self.prepared.kwargs, header, due, options, emit))
            return self.in_trail(self.result(header.task_id, duplicate=duplicate))
        headers = header.write(self.prepared.options.get("headers"))
        options = {**self.prepared.options, "headers": headers, "message_id": header.message_id}
        if self.prepared.call.own:
            options = expiring_in_workers(self.task.app, options)
        result = self.task.publish(self.prepared.args, self.prepared.kwargs, task_id=header.task_id, **options)
        if emit is not None:
            emit()
        return marked(result, header.message_id, duplicate=duplicate)

    def publish_or(
        self, take_back: Callable[[], object], emit: Callable[[], None], copy: Header | None = None
    ) -> AsyncResult[Any]:
        """Publish, and report the outcome once it is certain: with an outbox, after its commit. On an error, take the record back."""
        try:
            result = self.publish(copy, duplicate=copy is not None, emit=emit)
        except BaseException:
            # After any error the caller gets it and the id is free again. If the broker has the message after all, its
            # consumer inserts the row.
            try:
                self.ask(take_back)
            except StoreError as error:
                logger.warning("%s was not published, and its row stays pending: %s", self, error)
            else:
                self.emit(OutcomeKind.WITHDRAWN)
            raise
        if self.prepared.is_broadcast and self.box is None:
            end_broadcast(self.task, self.message)
        return result

    def result(self, task_id: str, *, duplicate: bool | None) -> AsyncResult[Any]:
        """Return the result of a Celery id."""
        return marked(self.task.AsyncResult(task_id), self.prepared.header.message_id, duplicate=duplicate)

    def in_trail(self, result: AsyncResult[Any]) -> AsyncResult[Any]:
        """Add the result to the calling task's trail, and return it."""
        if self.prepared.options.get("add_to_parent", True):
            parent = self.task.app.current_worker_task
            if parent:
                parent.add_trail(result)
        return result
