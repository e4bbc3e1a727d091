"""Send events for copies that did not run.

A pool's child decides on a copy, but only the main process knows whether events are enabled. So the child raises an exception that
carries what happened to the copy, and the main process sends the event.

===================================  ===============================================================================================
``task-skipped``, ``task-held``      Monitors that follow tasks, such as Flower, show the task as ``SKIPPED`` or ``HELD``, unless it has
                                     already ended. Flower counts both by type.
``idempotent-skipped``,              For a copy with the task id of a run that has not ended. Such monitors ignore these events, so the
``idempotent-held``                  state of that run stays as it is.
===================================  ===============================================================================================

Their fields are ``uuid``, ``message_id``, ``name`` (of the task) and, for a held copy, ``countdown``: seconds until it comes again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from celery.exceptions import Ignore

if TYPE_CHECKING:
    from celery.worker.request import Request

    from celery_idempotent.core.records import MessageKey

__all__ = ["EVENTS", "DuplicateIgnored", "announce"]

Fate = Literal["skipped", "held"]

#: What happened to a copy, by the types of events.
EVENTS: dict[str, Fate] = {
    "task-skipped": "skipped",
    "idempotent-skipped": "skipped",
    "task-held": "held",
    "idempotent-held": "held",
}


class DuplicateIgnored(Ignore):  # type: ignore[misc]
    """A copy did not run.

    Args:
        text: The text of the exception.
        key: The message.
        fate: What happened to the copy.
        running: Whether a run with the same task id has not ended.
        countdown: Seconds until a held copy comes again.
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
    """Send the event for a copy that did not run, if events are enabled; for any other error, send nothing."""
    if isinstance(error, DuplicateIgnored):
        fields = {"message_id": error.key.message_id, "name": error.key.task_name, "countdown": error.countdown}
        known = {name: value for name, value in fields.items() if value is not None}
        request.send_event(f"{'idempotent' if error.running else 'task'}-{error.fate}", **known)
