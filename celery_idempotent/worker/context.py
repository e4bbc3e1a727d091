"""The message that is running, for the code that a task calls."""

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
        message_id: Its id. Together with the task name it is the same in every run of the message, so both make an idempotency
            key for a service that takes one.
        task_name: The task that it belongs to.
        attempt: Celery's ``retries`` of this delivery; 0 for the first.
        token: The fencing token. It is greater in each run of the message, so a service that compares tokens can refuse an older
            run. ``None`` in a run without a claim (``idempotent_on_store_error="run"``, or the guard is off).
        deadline: When the lease ends at the earliest, by this machine's clock, in UTC. Until then no other worker takes the message
            over. Each renewal moves it; call again for the latest. ``None`` if the run does not hold the message.
    """

    message_id: str
    task_name: str
    attempt: int
    token: int | None
    deadline: datetime | None


def current_message() -> CurrentMessage | None:
    """Return the message that runs in this thread; ``None`` outside of a guarded task.

    A task that is called as a function, ``charge(order)``, has no message of its own. It sees the message of the guarded task whose body
    calls it; called from anywhere else, it sees ``None``. While the guard is off, the message has its id, but no token and no deadline.
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
    """Convert a time of the monotonic clock by the current wall clock, however that was set since the lease began."""
    return None if moment is None else datetime.now(UTC) + timedelta(seconds=moment - time.monotonic())
