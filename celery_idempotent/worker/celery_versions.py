"""What Celery's series have in different places, or not at all: read from 5.5.3, 5.6.3 and 5.7.0."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery import Task
    from celery.app.task import Context

__all__ = ["acknowledges_timeouts", "dated", "ignores_result", "retries_lost_workers"]


def retries_lost_workers(task: Task) -> bool:
    """Return whether Celery sends the next attempt of a task whose worker was lost. Before 5.7 it never does."""
    return bool(getattr(task, "retry_on_worker_lost", False))


def acknowledges_timeouts(task: Task) -> bool:
    """Return whether a message with ``acks_late`` is acknowledged at its time limit. Before 5.7 one option is for failures as well."""
    try:
        return bool(task.acks_on_timeout)
    except AttributeError:
        return bool(task.acks_on_failure_or_timeout)


def ignores_result(task: Task, request: Context) -> bool:
    """Return whether Celery stores no result for a request."""
    try:
        from celery.app.trace import get_actual_ignore_result
    except ImportError:  # before Celery 5.6, where a call could not ask for a result that its task ignores
        return bool(task.ignore_result or request.ignore_result)
    return bool(get_actual_ignore_result(task, request))


def dated(task: Task, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options of ``apply_async`` with moments that Celery can publish.

    A message that was published once has its moments as text. Before 5.7, the first protocol takes no text.
    """
    texts = [name for name in ("eta", "expires") if isinstance(options.get(name), str)]
    if not texts or task.app.conf.task_protocol != 1:
        return options
    return {**options, **{name: datetime.fromisoformat(options[name]) for name in texts}}
