"""A retry's state that Celery stores after the retry has ended hides that end: it is stored once more."""

from __future__ import annotations

import time

from celery import states
from celery.backends.base import DisabledBackend

from celery_idempotent.core.records import ProcessedStatus
from celery_idempotent.errors import AlreadyFailedError
from celery_idempotent.message.serialization import decode_result
from celery_idempotent.worker.celery_versions import ignores_result
from celery_idempotent.worker.run import Run
from celery_idempotent.worker.run_state import HandedOn

__all__ = ["retry_stored"]

#: Seconds that an attempt which has ended its row is given to store its result, and between two looks for that.
_OWN_RESULT_WITHIN = 2.0
_ASK_EVERY = 0.05


def retry_stored(run: Run) -> None:
    """Store the next attempt's end once more if RETRY, which the result backend was told just now, has hidden it.

    Celery publishes a retry before it stores that state: with ``countdown=0`` another process may be through by then, and
    its AsyncResult would be RETRY for ever. What it ended with is stored once more, from its row.
    """
    backend, task_id = run.task.backend, run.request.id
    if not isinstance(run.state, HandedOn) or run.request.is_eager or isinstance(backend, DisabledBackend):
        return
    if ignores_result(run.task, run.request) or not backend.persistent:
        return
    row = run.queue_log.store.find(run.key)
    if row is None or row.ran_task_id != task_id or row.processed_status is None:
        return
    # The row is written before the result: the attempt that ended may be about to store it, with the error itself.
    deadline = time.monotonic() + _OWN_RESULT_WITHIN
    while backend.get_state(task_id) not in states.READY_STATES:
        if time.monotonic() >= deadline:
            break
        time.sleep(_ASK_EVERY)
    else:
        return
    if row.processed_status is ProcessedStatus.SUCCESS:
        value = None if row.result is None else decode_result(run.task.app, row.result)
        backend.store_result(task_id, value, states.SUCCESS, request=run.request)
    else:
        error = AlreadyFailedError(run.key.message_id, row.error)
        backend.store_result(task_id, error, states.FAILURE, request=run.request)
