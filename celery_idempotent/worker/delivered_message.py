"""A delivered message while it is decided on: its identity, its header, its run, and its full record."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from celery_idempotent.core.abandoned import Done
from celery_idempotent.core.records import MessageKey, NewMessage, Row
from celery_idempotent.message.canvas_ids import fix_callbacks
from celery_idempotent.message.header import Header, rejections
from celery_idempotent.message.identity import FANOUT, Identity
from celery_idempotent.message.serialization import content_of, encode_message, serializer_of
from celery_idempotent.producer.identify import identify
from celery_idempotent.worker.run import Run

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_idempotent.core.store import Store
    from celery_idempotent.producer.guarded import Guarded

__all__ = ["DeliveredMessage"]


class DeliveredMessage:
    """A delivered message, and the run that it is to become.

    Args:
        task: The delivery's task.
        request: Celery's traced request.
        identity: The row that the message belongs to.

    Raises:
        ConfigurationError: No store can keep its ids, headers or numbers.
    """

    def __init__(self, task: Guarded, request: Context, identity: Identity) -> None:
        self.task = task
        self.request = request
        self.identity = identity
        #: The message to claim.
        self.message = NewMessage(
            key=identity.key,
            task_id=request.id,
            queue=(request.delivery_info or {}).get("routing_key"),
            attempt=0 if request.retries is None else request.retries,
        )
        key = MessageKey(identity.message_id, task.name)
        header = Header.delivered(key, request.id, request.headers)
        #: What the task said of it, if its owner had died when it was done: see ``ask_task``.
        self.done: Done | None = None
        #: Whether the message says which Celery id was first sent under its message id.
        self.knows_first = header is not None
        if header is None:
            # From a producer without this library. Its id stands; the task's options say whether its arguments are compared.
            named = key.message_id if key.message_id != request.id and identity.older is None else None
            _, fingerprint = identify(
                task.idempotency,
                request.args,
                request.kwargs,
                message_id=named,
                task_id=request.id,
                task_name=task.name,
            )
            header = Header.new(key, request.id, fingerprint)
        if header.trace is None:
            header = replace(header, trace=task.queue_log.hooks.trace_among(request.headers))
        header = replace(header, rejected=header.rejected + rejections(request.headers))
        fix_callbacks(request)
        self.message = replace(self.message, fingerprint=header.fingerprint, original_task_id=header.original_task_id)
        self.run = Run(task, request, self.message, header)
        self.mark()

    def __str__(self) -> str:
        return str(self.run)

    @property
    def store(self) -> Store:
        """The store of the task's app."""
        return self.run.queue_log.store

    @property
    def header(self) -> Header:
        """The message's header, completed by what its row says."""
        return self.run.header

    @property
    def is_broadcast(self) -> bool:
        """Whether each worker gets the message."""
        return self.identity.node is not None

    def is_of(self, row: Row) -> bool:
        """Return whether the message has the Celery id that the row was recorded under or ran under."""
        return self.request.id in (row.task_id, row.ran_task_id)

    def mark(self, **changes: Any) -> None:
        """Update the header, which a retry and a held copy carry on."""
        self.run.header = replace(self.run.header, **changes)
        self.request.headers = self.run.header.write(self.request.headers)

    def adopted(self) -> NewMessage:
        """Return the full record of a message that its producer did not record."""
        request = self.request
        if request.is_eager:
            return self.message  # its arguments may not be serializable, and it is never published again
        signature = self.task.signature_from_request(request, retries=request.retries)
        options = {**signature.options, **content_of(request), "message_id": self.header.message_id}
        if self.is_broadcast:
            options["exchange_type"] = FANOUT  # for recovery, which may not know the exchange
        data = encode_message(
            request.args,
            request.kwargs,
            options,
            serializer=serializer_of(self.task, options),
            trace=self.header.trace,
        )
        return replace(self.message, message=self.run.keeping.of(data))
