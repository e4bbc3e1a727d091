"""Run messages without the guard, where it is off for their task or gone from it, and end the rows that they have all the same.

Nothing is refused, held or replayed. The row of a recorded message, or one that a worker with the guard has claimed and lost, is ended after
the body, so that it does not run again when the guard is back. ADR 26 has the whole table.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, NoResultReason, Status
from celery_idempotent.message.header import Header, is_marked_unrecorded
from celery_idempotent.message.identity import identity_of
from celery_idempotent.worker.body_end import BodyEnd, Completed, Failed, Ignored, end_as_seen
from celery_idempotent.worker.delivery import answered, worker_label
from celery_idempotent.worker.discards import discard
from celery_idempotent.worker.row_endings import RowEndings
from celery_idempotent.worker.run import Run

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_idempotent.core.store import Store
    from celery_idempotent.producer.guarded import Guarded
    from celery_idempotent.queue_log import QueueLog

__all__ = ["discard_later", "end_by_header", "end_later", "end_run", "run_unguarded"]

logger = logging.getLogger("celery_idempotent")

#: Seconds of the lease between the two statements that claim and end the row.
_LEASE = 60.0


def run_unguarded(task: Guarded, request: Context) -> Run:
    """Let a delivery of a task whose guard is off run as Celery's own. The store is not asked."""
    # The id is for `current_message()`: services that the body calls must see the one that they see with the guard.
    try:
        message = NewMessage(identity_of(task, request).key, request.id, attempt=request.retries or 0)
    except Exception as refused:  # noqa: BLE001 - a user's callable may raise anything, which nothing depends on here
        logger.warning("%s[%s] runs without a message id: %r", task.name, request.id, refused)
        message = NewMessage(MessageKey(request.id, task.name), request.id)
    header = Header.delivered(message.key, request.id, request.headers) or Header.new(message.key, request.id)
    run = Run(task, request, message, header)
    run.attach()
    return run


def end_run(task: Guarded, request: Context, state: str | None, outcome: Any) -> None:
    """End the row of a delivery that ran without the guard, as Celery has seen it end. One that goes on keeps its row."""
    run = Run.of(request)
    if run is not None and state is not None:
        end_later(task, request, end_as_seen(state, outcome, replacing=run.replacing, rejections=run.header.rejected))


def end_later(task: Guarded, request: Context, end: BodyEnd, *, wait: bool = True) -> None:
    """End the row of a delivery that ran without the guard, if it has one and the store answers.

    Args:
        task: The task.
        request: Celery's context of the delivery.
        end: How the body ended.
        wait: As for :meth:`RowEndings.add`.
    """
    if _has_no_row(request) or not isinstance(end, (Completed, Failed, Ignored)):
        return
    ended = _Ended(task.queue_log, request, end)

    def write() -> None:
        ended.end_all(_keys(task, request))
        answered(task, request)

    RowEndings.of(task.queue_log).add(f"{task.name}[{request.id}]", write, wait=wait and not request.is_eager)


def discard_later(task: Guarded, request: Context, why: str) -> None:
    """End the row of a message that Celery discards, outside of the worker's event loop."""
    if not _has_no_row(request):
        RowEndings.of(task.queue_log).add(
            f"{task.name}[{request.id}]", partial(discard, task, request, why), wait=False
        )


def end_by_header(queue_log: QueueLog, header: Header, request: Context, error: str | None) -> None:
    """End the row of a recorded message whose task has lost its ``base=IdempotentTask``.

    Args:
        queue_log: The queue log of its app.
        header: The message's header.
        request: Celery's context of the delivery.
        error: The body's error; ``None`` if it returned.
    """
    end: BodyEnd = Completed(None) if error is None else Failed(error)
    ended = _Ended(queue_log, request, end)
    RowEndings.of(queue_log).add(str(header.key), lambda: ended.end_all([header.key]), wait=True)


def _has_no_row(request: Context) -> bool:
    """Return whether no worker can have recorded it: it was sent without a row, and the broker has not delivered it before."""
    return is_marked_unrecorded(request.headers) and not (request.delivery_info or {}).get("redelivered")


def _keys(task: Guarded, request: Context) -> list[MessageKey]:
    """Return the keys that the delivery's row may have."""
    try:
        identity = identity_of(task, request)
    except Exception as error:  # noqa: BLE001 - a user's callable may raise anything; then no worker can have recorded it
        logger.debug("%s has no row: %r", request.id, error)
        return []
    return [identity.key] if identity.older is None else [identity.older, identity.key]


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a delivery ended that ran without the guard."""

    queue_log: QueueLog
    request: Context
    end: BodyEnd

    @property
    def _store(self) -> Store:
        return self.queue_log.store

    def end_all(self, keys: list[MessageKey]) -> None:
        """End the rows under these keys that are the delivery's.

        Raises:
            StoreError: A row stays as it is.
        """
        for key in keys:
            claimed = self._claim(key)
            if claimed is not None:
                self._write(claimed)
                logger.warning("%s ran without the guard; its row is ended", key)

    def _claim(self, key: MessageKey) -> Claimed | None:
        """Claim a row that waits for this delivery, or whose owner has died. One that runs elsewhere, or has ended, is left alone."""
        row, task_id = self._store.find(key), self.request.id
        if row is None or task_id not in (row.task_id, row.ran_task_id):
            return None
        attempt, worker = max(self.request.retries or 0, row.attempt), worker_label(self.request.hostname)
        if row.status is Status.PENDING and row.task_id == task_id:
            message = NewMessage(key, task_id, attempt=attempt, message=row.message)
            claimed = self._store.claim(message, worker=worker, lease=_LEASE, grace=0.0)
            return claimed if isinstance(claimed, Claimed) else None
        if row.status is Status.PROCESSING and row.lease_left <= 0:
            return self._store.take_over(row, task_id=task_id, worker=worker, lease=_LEASE, attempt=attempt)
        return None

    def _write(self, claimed: Claimed) -> None:
        match self.end:
            case Failed(error):
                self._store.fail(claimed.claim, error=error)
            case Ignored(note):
                self._store.complete(claimed.claim, result=None, note=note)
            case _:
                self._store.complete(claimed.claim, result=None, note=NoResultReason.UNKEPT)
