"""Purge: delete the rows of messages that have been done for long enough."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from celery_idempotent.core.fork_lock import no_fork
from celery_idempotent.core.records import ProcessedStatus
from celery_idempotent.core.store import BATCH
from celery_idempotent.hooks import OutcomeKind

if TYPE_CHECKING:
    from celery_idempotent.queue_log import QueueLog

__all__ = ["purge", "purgeable"]

#: Seconds that a recovery pass spends on purging; the next pass continues.
_PURGE_FOR = 5.0


def purge(
    queue_log: QueueLog,
    *,
    older_than: float | None = None,
    task_name: str | None = None,
    processed_status: ProcessedStatus | None = None,
    within: float | None = None,
) -> int:
    """Delete rows of messages that are done, in small batches. Their ids are free again.

    Args:
        queue_log: The queue log.
        older_than: Seconds since they were done; ``None`` for ``idempotent_retention``.
        task_name: Only rows of this task; a pattern with ``*`` and ``?``.
        processed_status: Only rows that ended with it. Unless it is ``FAILURE``, failures that can be requeued are kept for
            ``idempotent_failure_retention``.
        within: Seconds after which to stop; ``None`` for the share of a recovery pass.

    Returns:
        How many were deleted.

    Raises:
        StoreError: The store did not answer, or its schema has another version.
    """
    chosen = _old(queue_log, older_than, task_name, processed_status)
    purged, deadline = 0, time.monotonic() + (_PURGE_FOR if within is None else within)
    while time.monotonic() < deadline:
        with no_fork():
            deleted = queue_log.store.purge(**chosen, limit=BATCH)
            if deleted:
                queue_log.hooks.emit(OutcomeKind.PURGED, count=deleted)
        purged += deleted
        if deleted < BATCH:
            break
    return purged


def purgeable(
    queue_log: QueueLog,
    *,
    older_than: float | None = None,
    task_name: str | None = None,
    processed_status: ProcessedStatus | None = None,
) -> int:
    """Return how many rows :func:`purge` would delete now.

    Raises:
        StoreError: The store did not answer, or its schema has another version.
    """
    return queue_log.store.purgeable(**_old(queue_log, older_than, task_name, processed_status))


def _old(
    queue_log: QueueLog, older_than: float | None, task_name: str | None, processed_status: ProcessedStatus | None
) -> dict[str, Any]:
    settings = queue_log.settings
    failures_only = older_than is not None and processed_status is ProcessedStatus.FAILURE
    return {
        "older_than": settings.retention if older_than is None else older_than,
        "failures_older_than": None if failures_only else settings.failure_retention,
        "task_name": task_name,
        "processed_status": processed_status,
    }
