"""What the code below a task may know of the message that is being run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from celery._state import get_current_worker_task

from celery_idempotent.worker.lease_renewal import LeaseRenewer
from celery_idempotent.worker.run import Run

__all__ = ["CurrentMessage", "current_message"]


@dataclass(frozen=True, slots=True)
class CurrentMessage:
    """The message whose body runs.

    Attributes:
        message_id: Its id. With the task name it is the same at every run of the message, so together they make an idempotency
            key for a service that takes one.
        task_name: The task it belongs to.
        attempt: Celery's ``retries`` of this delivery; 0 for the first.
        token: The fencing token: greater at each run of the message, so that a service that compares it can refuse an older
            run. ``None`` in a run without a claim (``idempotent_on_store_error="run"``).
        deadline: Until when the lease lasts at least, by this machine's clock, in UTC: until then nobody else takes the message
            over. It moves on when the lease is renewed; ask again for the latest. ``None`` when the run does not hold the message.
    """

    message_id: str
    task_name: str
    attempt: int
    token: int | None
    deadline: datetime | None


def current_message() -> CurrentMessage | None:
    """Return the message that is being run here and now, in this thread; ``None`` outside of a guarded task.

    Inside of a task that is called as a function by a guarded one, it is the guarded one's.
    """
    task = get_current_worker_task()
    run = None if task is None else Run.of(task.request_stack.top)
    if run is None:
        return None
    claim = run.claim
    return CurrentMessage(
        message_id=run.key.message_id,
        task_name=run.key.task_name,
        attempt=run.message.attempt,
        token=None if claim is None else claim.token,
        deadline=None if claim is None else _on_the_clock(LeaseRenewer.of(run.task.queue_log).until(claim)),
    )


def _on_the_clock(moment: float | None) -> datetime | None:
    """Return a moment of the monotonic clock, told by the wall clock as it stands now: however that was set since the lease began."""
    return None if moment is None else datetime.now(UTC) + timedelta(seconds=moment - time.monotonic())
