"""Store a retry's outcome again if Celery has overwritten it with the state RETRY."""

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

__all__ = ["OWN_RESULT_WITHIN", "retry_stored"]

#: Seconds for an attempt to store its result after it has ended its row, and between two checks for that.
OWN_RESULT_WITHIN = 2.0
_ASK_EVERY = 0.05


def retry_stored(run: Run) -> None:
    """Store the next attempt's outcome again, from its row, if the state RETRY of this attempt has overwritten it.

    Celery publishes a retry before it stores RETRY. With ``countdown=0`` another process may finish the retry before that, and the
    AsyncResult would stay RETRY for ever.
    """
    backend, task_id = run.task.backend, run.request.id
    if not isinstance(run.state, HandedOn) or run.request.is_eager or isinstance(backend, DisabledBackend):
        return
    if ignores_result(run.task, run.request) or not backend.persistent:
        return
    row = run.queue_log.store.find(run.key)
    if row is None or row.ran_task_id != task_id or row.processed_status is None:
        return
    # The row is written before the result, so the attempt may be about to store its result, with the original error.
    deadline = time.monotonic() + OWN_RESULT_WITHIN
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
