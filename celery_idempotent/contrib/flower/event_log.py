"""Keep the copies in workers' events: those held now and those skipped lately, which no row shows.

Flower already receives the events of all workers. They are kept in memory, from the first request for one of our pages.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from celery_idempotent.core.records import MessageKey
from celery_idempotent.core.storable import is_text
from celery_idempotent.worker.events import EVENTS

__all__ = ["Copy", "EventLog"]

#: How many copies are kept.
_KEPT = 1000

#: Seconds for which an overdue copy is still shown as held.
_LATE = 60.0

#: The last second since the epoch that can be shown as a date.
_LAST = 250_000_000_000

#: Events that end a hold, because the copy itself has ended.
_ENDS = {"task-succeeded", "task-failed", "task-revoked", "task-rejected"}


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy that did not run, from its last event.

    Attributes:
        key: The message.
        task_id: The copy's Celery id.
        fate: ``skipped`` or ``held``.
        worker: The worker that sent the event.
        since: The time of its first event, in seconds since the epoch, by that worker's clock.
        at: The time of its last event.
        times: How many events there were.
        countdown: Seconds from ``at`` until it comes again, if it is held.
    """

    key: MessageKey
    task_id: str
    fate: str
    worker: str
    since: float
    at: float
    times: int = 1
    countdown: float = 0.0


class EventLog:
    """The copies with the latest events."""

    def __init__(self) -> None:
        self._copies: OrderedDict[str, Copy] = OrderedDict()
        self._state: Any = None

    def listen(self, state: Any) -> None:
        """Listen to the events of Flower's cluster state; repeating this for one state changes nothing.

        Do not use the state's ``event_callback``: ``--persistent`` would write it to a file together with the state.
        """
        if self._state is state:
            return
        self._state, told = state, state.event

        def event(fields: dict[str, Any]) -> Any:
            self.note(fields)
            return told(fields)

        state.event = event

    def note(self, event: Mapping[str, Any]) -> None:
        """Note an event."""
        task_id, type_ = event.get("uuid"), event.get("type")
        if not (is_text(task_id) and isinstance(type_, str)):
            return  # anyone with access to the broker may send malformed events
        fate = EVENTS.get(type_)
        if fate is None:
            if type_ in _ENDS and task_id in self._copies and self._copies[task_id].fate == "held":
                del self._copies[task_id]
            return
        message_id, name, worker = event.get("message_id"), event.get("name"), event.get("hostname")
        at, countdown = event.get("timestamp") or time.time(), event.get("countdown") or 0.0
        if not (is_text(message_id) and is_text(name) and is_text(worker) and _is_time(at) and _is_time(countdown)):
            return
        before = self._copies.pop(task_id, None)
        if before is not None and before.fate != fate:
            before = None
        self._copies[task_id] = Copy(
            MessageKey(message_id, name),
            task_id,
            fate,
            worker,
            since=at if before is None else before.since,
            at=at,
            times=1 if before is None else before.times + 1,
            countdown=countdown,
        )
        while len(self._copies) > _KEPT:
            self._copies.popitem(last=False)

    def held(self) -> list[Copy]:
        """Return held copies, the longest held first."""
        now = time.time()
        held = (copy for copy in self._copies.values() if copy.fate == "held")
        return sorted((copy for copy in held if copy.at + copy.countdown + _LATE > now), key=lambda copy: copy.since)

    def skipped(self) -> list[Copy]:
        """Return skipped copies, the latest first."""
        return [copy for copy in reversed(self._copies.values()) if copy.fate == "skipped"]

    def of(self, key: MessageKey) -> list[Copy]:
        """Return the copies of a message, the latest first."""
        return [copy for copy in reversed(self._copies.values()) if copy.key == key]


def _is_time(value: object) -> TypeGuard[float]:
    """Return whether a value is a number of seconds, a time or a duration, that a page can show."""
    return isinstance(value, (int, float)) and 0 <= value < _LAST
