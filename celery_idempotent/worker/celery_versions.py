"""Differences between Celery's series; read from 5.5.3, 5.6.3 and 5.7.0."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery.canvas import Signature, _chain

from celery_idempotent.message.canvas_ids import derived

if TYPE_CHECKING:
    from celery import Task
    from celery.app.task import Context

__all__ = [
    "NESTING",
    "acknowledges_timeouts",
    "dated",
    "id_of_step",
    "ignores_result",
    "replacements",
    "retries_lost_workers",
]

#: How often a task was replaced: an option of ``apply_async``. ``apply`` drops it, so ours puts it into the headers.
NESTING = "replaced_task_nesting"


def retries_lost_workers(task: Task) -> bool:
    """Return whether Celery sends the next attempt of a task whose worker was lost; never before 5.7."""
    return bool(getattr(task, "retry_on_worker_lost", False))


def acknowledges_timeouts(task: Task) -> bool:
    """Return whether a message with ``acks_late`` is acknowledged at its time limit. Before 5.7, failures have the same option."""
    try:
        return bool(task.acks_on_timeout)
    except AttributeError:
        return bool(task.acks_on_failure_or_timeout)


def ignores_result(task: Task, request: Context) -> bool:
    """Return whether Celery stores no result for a request."""
    try:
        from celery.app.trace import get_actual_ignore_result
    except ImportError:  # before Celery 5.6, a call could not ask for a result that its task ignores
        return bool(task.ignore_result or request.ignore_result)
    return bool(get_actual_ignore_result(task, request))


def replacements(request: Context) -> int:
    """Return how often the task of a request was replaced."""
    headers = request.headers if isinstance(request.headers, Mapping) else {}
    count = request.replaced_task_nesting or headers.get(NESTING)
    return count if isinstance(count, int) else 0


def dated(task: Task, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return options of ``apply_async`` whose times Celery can publish.

    A message that was published once has its times as text, which Celery before 5.7 cannot publish by the first protocol.
    """
    texts = [name for name in ("eta", "expires") if isinstance(options.get(name), str)]
    if not texts or task.app.conf.task_protocol != 1:
        return options
    return {**options, **{name: datetime.fromisoformat(options[name]) for name in texts}}


def id_of_step(task_id: str) -> str:
    """Return the id of a call that an eager chain may be making.

    A frozen chain passes its own Celery id to every task that it applies, although each has an id of its own. Only the frame of the function
    that applies them knows which task it is.

    Args:
        task_id: The Celery id that the call was given.

    Returns:
        The id of the chain's task; ``task_id`` if no chain makes the call.
    """
    frame = sys._getframe(1)  # noqa: SLF001 - Celery passes nothing else that tells a chain's tasks apart
    while frame.f_code is not Signature.apply.__code__:
        # A task's own `apply` may call `super()`.
        if frame.f_code.co_name != "apply" or frame.f_back is None:
            return task_id
        frame = frame.f_back
    caller = frame.f_back
    if caller is None or caller.f_code is not _chain.apply.__code__:
        return task_id
    chain, step = (caller.f_locals[name] for name in ("self", "task"))
    number = next((number for number, one in enumerate(chain.tasks) if one is step), None)
    return str(step.options.get("task_id") or derived(task_id, "step", number))
