"""What a worker's main process is told of a copy that did not run, and the event that it sends of it.

The child decides; to the main process a copy that is skipped or held is a message to be ignored. Only the main process knows whether
anybody wants events, so the exception tells it what became of the copy.

===================================  ===============================================================================================
``task-skipped``, ``task-held``      To whoever follows tasks, as Flower does, the task has the state ``SKIPPED`` or ``HELD``, unless it has
                                     ended already. Flower counts both by type.
``idempotent-skipped``,              Of a copy with the task id of a run that has not ended: whoever follows tasks passes over it, so that the
``idempotent-held``                  state of that run stays what it is.
===================================  ===============================================================================================

Their fields are ``uuid``, ``message_id``, ``name`` (of the task) and, of what is held, ``countdown``: seconds until it comes again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from celery.exceptions import Ignore

if TYPE_CHECKING:
    from celery.worker.request import Request

    from celery_idempotent.core.records import MessageKey

__all__ = ["EVENTS", "DuplicateIgnored", "announce"]

Fate = Literal["skipped", "held"]

#: What becomes of a copy, by the types of the events.
EVENTS: dict[str, Fate] = {
    "task-skipped": "skipped",
    "idempotent-skipped": "skipped",
    "task-held": "held",
    "idempotent-held": "held",
}


class DuplicateIgnored(Ignore):  # type: ignore[misc]
    """A copy did not run.

    Args:
        text: What is said of it.
        key: The message.
        fate: What became of it.
        running: Whether its task id is that of a run that has not ended.
        countdown: Seconds until a copy that is held comes again.
    """

    def __init__(self, text: str, key: MessageKey, fate: Fate, running: bool, countdown: float | None = None) -> None:
        super().__init__(text, key, fate, running, countdown)
        self.key = key
        self.fate = fate
        self.running = running
        self.countdown = countdown

    def __str__(self) -> str:
        return str(self.args[0])


def announce(request: Request, error: BaseException) -> None:
    """Send the event of a copy that did not run, if anybody wants events; of any other error, none."""
    if isinstance(error, DuplicateIgnored):
        fields = {"message_id": error.key.message_id, "name": error.key.task_name, "countdown": error.countdown}
        known = {name: value for name, value in fields.items() if value is not None}
        request.send_event(f"{'idempotent' if error.running else 'task'}-{error.fate}", **known)
