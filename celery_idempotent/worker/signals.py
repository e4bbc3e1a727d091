"""Connect to Celery's signals: the end of a run, and messages that will not run. Calls by name have theirs in the producer."""

from __future__ import annotations

from typing import Any

from celery import signals, states
from celery.app.task import Context

from celery_idempotent.message.canvas_ids import is_guarded
from celery_idempotent.message.header import Header
from celery_idempotent.producer.by_name import record_calls_by_name
from celery_idempotent.producer.unrecorded import is_unrecorded
from celery_idempotent.queue_log import QueueLog
from celery_idempotent.worker.bootsteps import CheckStep, RecoveryStep
from celery_idempotent.worker.delivery import answered, describe
from celery_idempotent.worker.discards import EXPIRED, REVOKED, discard
from celery_idempotent.worker.late_retry import retry_stored
from celery_idempotent.worker.run import Run
from celery_idempotent.worker.turned_off import discard_later, end_by_header, end_run

__all__ = ["install"]


def install(queue_log: QueueLog) -> None:
    """Connect the hooks for an app's queue log; repeating this changes nothing."""
    record_calls_by_name(queue_log)
    queue_log.app.steps["worker"].update({CheckStep, RecoveryStep})
    signals.task_success.connect(_succeeded)
    signals.task_postrun.connect(_after_run)
    signals.task_revoked.connect(_revoked)


def _ran_unguarded(
    sender: Any, task_id: str | None = None, retval: Any = None, state: str | None = None, **_: Any
) -> None:
    """End the row of a message whose task has lost its ``base=IdempotentTask``, and which ran as a plain task; otherwise it would run again."""
    if is_guarded(sender) or task_id is None:
        return
    request = sender.request_stack.top
    header = None if request is None else Header.read(request.headers)
    if header is None or not header.belongs_to(sender.name, task_id) or state not in states.READY_STATES:
        return
    if "queue_log" not in vars(sender.app) and not sender.app.conf.get("idempotent_store"):
        return  # an app without a queue log, to which guarded apps send
    end_by_header(QueueLog.of(sender.app), header, request, describe(retval) if state == states.FAILURE else None)


signals.task_postrun.connect(_ran_unguarded)


def _succeeded(sender: Any, **_: Any) -> None:
    """Complete a checkpointed run: callbacks and result were sent."""
    run = Run.of(sender.request_stack.top) if is_guarded(sender) and not is_unrecorded(sender) else None
    if run is not None:
        run.dispatched()
        answered(run.task, run.request)


def _after_run(sender: Any, state: str | None = None, retval: Any = None, **_: Any) -> None:
    """End the run. If callbacks or result were not sent by now, they will not be.

    The state does not tell: it is SUCCESS even if the result backend did not take the result.
    """
    if not is_guarded(sender):
        return
    request = sender.request_stack.top
    if is_unrecorded(sender):
        end_run(sender, request, state, retval)
        return
    run = Run.of(request)
    if state == states.FAILURE and request is not None:
        answered(sender, request)
    if run is not None:
        run.end_as_seen(state, retval)
        run.not_dispatched(retval if state == states.FAILURE else None)
        run.detach()
        if state == states.RETRY:
            retry_stored(run)


def _revoked(sender: Any, request: Context, terminated: bool = False, expired: bool = False, **_: Any) -> None:
    """End a message that was revoked or has expired before it ran. A terminated body's request reports that itself."""
    if terminated or not is_guarded(sender):
        return
    why = EXPIRED if expired else REVOKED
    if is_unrecorded(sender):
        discard_later(sender, request, why)
        return
    answered(sender, request)
    discard(sender, request, why)
