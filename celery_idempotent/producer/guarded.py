"""Protocols of a guarded task and of its run, for the producer and the layers above it.

``IdempotentTask`` and the worker's ``Run`` are in higher layers, so the producer cannot import them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context
    from celery.result import AsyncResult

    from celery_idempotent.core.records import MessageKey, NewMessage
    from celery_idempotent.message.canvas_ids import Calls
    from celery_idempotent.message.header import Header
    from celery_idempotent.options import Options
    from celery_idempotent.queue_log import QueueLog

__all__ = ["RUN", "Guarded", "GuardedRun", "UnrecordedCall", "current_run"]

#: The attribute of Celery's request that holds its run.
RUN = "idempotent_run"


class Guarded(Protocol):
    """A task with ``base=IdempotentTask``: what this library adds to it, and the parts of Celery's task that are used."""

    @property
    def queue_log(self) -> QueueLog:
        """The app's queue log."""

    @property
    def idempotency(self) -> Options:
        """The task's options, checked."""

    def publish(self, args: Any, kwargs: Any, **options: Any) -> AsyncResult[Any]:
        """Publish a message that has a row."""

    def publish_copy(self, request: Context, message_id: str, countdown: float) -> None:
        """Publish a running delivery's message again, to arrive in ``countdown`` seconds."""

    # -- Celery's ------------------------------------------------------------------------------------------------------

    name: Any
    app: Any
    backend: Any
    request: Any
    request_stack: Any
    serializer: Any
    acks_late: Any
    acks_on_timeout: Any
    acks_on_failure_or_timeout: Any
    default_retry_delay: Any
    ignore_result: Any
    max_retries: Any
    soft_time_limit: Any
    store_eager_result: Any
    time_limit: Any
    typing: Any
    #: Makes the result of a Celery id.
    AsyncResult: Any
    signature_from_request: Any
    on_success: Any
    _get_exec_options: Any


class GuardedRun(Protocol):
    """The run of a guarded task, as needed for the calls that its body makes."""

    #: Celery's request of the delivery.
    request: Any
    #: The delivery's header.
    header: Header
    #: Whether the body is replacing itself by another task under the same task id.
    replacing: bool

    @property
    def key(self) -> MessageKey:
        """The key of its row."""

    @property
    def given_id(self) -> str | None:
        """The message id that came with the message, as its property."""

    @property
    def in_body(self) -> bool:
        """Whether the body has not ended yet."""

    @property
    def calls(self) -> Calls:
        """The calls that the body makes."""

    def later_call(self, task_id: str) -> str | None:
        """Return the name for a call that Celery sends after this run, if its Celery id was sent before."""

    def hand_on(self, message: NewMessage) -> bool:
        """Move the row to the next attempt; return whether the claim still held."""

    def leave_to_recovery(self, error: BaseException) -> bool:
        """Leave publishing the next attempt to recovery; return whether there is a row from which it can be published."""

    def not_handed_on(self, message: NewMessage, error: BaseException) -> None:
        """End the message, because its next attempt could not be published."""


class UnrecordedCall(Protocol):
    """A call that has no row, because the guard is off."""

    @property
    def task(self) -> Guarded:
        """The task that is called."""

    def send(self) -> None:
        """Hand it to the broker."""


def current_run(app: Celery) -> GuardedRun | None:
    """Return the run of the task that this thread executes, if it is guarded."""
    task = app.current_worker_task
    return None if task is None else cast("GuardedRun | None", getattr(task.request, RUN, None))
