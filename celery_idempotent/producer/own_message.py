"""Publish the running task's own next attempt: its retry, or its replacement by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kombu.exceptions import OperationalError

from celery_idempotent.producer.publishing import Publishing

if TYPE_CHECKING:
    from celery.result import AsyncResult

__all__ = ["forward_own_message"]


def forward_own_message(call: Publishing) -> AsyncResult[Any]:
    """Move the row to the next attempt, then publish it."""
    run, task_id = call.prepared.run, call.message.task_id
    # A retry always has a due time, so that older copies do not wait for a lost one for ever.
    message = replace(call.message, delay=call.message.delay or 0.0)
    if run is not None and not run.hand_on(message):
        # The claim is lost, and with it the right to retry; the run ends without an answer: see `perform` in the worker.
        return call.result(task_id, duplicate=True)
    try:
        return call.publish()
    except OperationalError as error:
        # The broker is down. Celery drops a message whose retry it cannot publish; the row keeps it.
        if run is None or not run.leave_to_recovery(error):
            raise
        return call.result(task_id, duplicate=False)
    except Exception as error:
        if run is not None:
            run.not_handed_on(message, error)
        raise
    except BaseException as error:
        # This process has to exit, and the broker may or may not have the message.
        if run is not None:
            run.leave_to_recovery(error)
        raise
