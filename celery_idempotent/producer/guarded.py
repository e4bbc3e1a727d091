"""A guarded task, and the run that a call is made from, as the layers below them see both.

``IdempotentTask`` and the worker's ``Run`` stand above the producer, which asks here instead of importing them.
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

__all__ = ["RUN", "Guarded", "GuardedRun", "current_run"]

#: The attribute of Celery's request that holds its run.
RUN = "idempotent_run"


class Guarded(Protocol):
    """A task with ``base=IdempotentTask``: what the guard adds to it, and what of Celery's it goes by."""

    @property
    def queue_log(self) -> QueueLog:
        """The app's queue log."""

    @property
    def idempotency(self) -> Options:
        """The task's options, checked."""

    def publish(self, args: Any, kwargs: Any, **options: Any) -> AsyncResult[Any]:
        """Publish a message whose row is there."""

    def publish_copy(self, request: Context, message_id: str, countdown: float) -> None:
        """Publish a running delivery's message once more, to arrive in ``countdown`` seconds."""

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
    #: Makes the result of a Celery id.
    AsyncResult: Any
    signature_from_request: Any
    on_success: Any
    _get_exec_options: Any


class GuardedRun(Protocol):
    """The run of a guarded task, as the calls that its body makes see it."""

    #: Celery's request of the delivery.
    request: Any
    #: What the delivery's header says.
    header: Header
    #: Whether the body is about to replace itself by another task under the same task id.
    replacing: bool

    @property
    def key(self) -> MessageKey:
        """The key of its row."""

    @property
    def is_unguarded(self) -> bool:
        """Whether it has no row to speak of."""

    @property
    def in_body(self) -> bool:
        """Whether the body has not ended yet."""

    @property
    def calls(self) -> Calls:
        """The calls that the body makes."""

    def later_call(self, task_id: str) -> str | None:
        """Return the name of a call that Celery sends after this run, under a Celery id that was sent before."""

    def hand_on(self, message: NewMessage) -> bool:
        """Move the row on to the next attempt; whether the claim still held."""

    def leave_to_recovery(self, error: BaseException) -> bool:
        """Note that the next attempt is still to be published; whether there is a row that says so."""

    def not_handed_on(self, message: NewMessage, error: BaseException) -> None:
        """End the message: its next attempt could not be published."""


def current_run(app: Celery) -> GuardedRun | None:
    """Return the run of the task that this worker executes here and now, if that is a guarded one."""
    task = app.current_worker_task
    return None if task is None else cast("GuardedRun | None", getattr(task.request, RUN, None))
