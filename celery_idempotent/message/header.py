"""The header that travels with a message: its id, and facts that the consumer must not compute again.

The id is the AMQP property ``message_id``, which any producer can set. A producer with this library also sends the header
``idempotent``, because ``Task.retry`` drops properties but keeps headers, and an eager run has headers only. The producer computes the
fingerprint once, so it stays right if a body changes its arguments and retries with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from celery.utils import uuid

from celery_idempotent.core.records import MessageKey
from celery_idempotent.core.storable import FINGERPRINT, is_text

__all__ = [
    "HEADER",
    "TRACE_HEADER",
    "Header",
    "is_marked_unrecorded",
    "is_trace",
    "later_call",
    "mark_unrecorded",
    "rejections",
]

HEADER = "idempotent"

#: The header of W3C trace context. Tracing libraries put it there, not this one.
TRACE_HEADER = "traceparent"

_TRACE = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def later_call() -> str:
    """Return a new name for a call whose Celery id was sent before."""
    return f"again:{uuid()}"


def rejections(headers: Mapping[str, Any] | None) -> int:
    """Return how often RabbitMQ dead-lettered a message because it was rejected, from its header ``x-death``."""
    deaths = headers.get("x-death") if isinstance(headers, Mapping) else None
    counts = [
        death.get("count")
        for death in (deaths if isinstance(deaths, list) else ())
        if isinstance(death, Mapping) and death.get("reason") == "rejected"
    ]
    return sum(count for count in counts if isinstance(count, int) and count > 0)


def mark_unrecorded(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the headers of a message that was sent without a row, because the guard was off."""
    return {**(headers or {}), HEADER: {"unrecorded": True}}


def is_marked_unrecorded(headers: Mapping[str, Any] | None) -> bool:
    """Return whether a message was sent without a row. A worker may have recorded it since."""
    found = headers.get(HEADER) if isinstance(headers, Mapping) else None
    return isinstance(found, Mapping) and found.get("unrecorded") is True


def is_trace(value: object) -> bool:
    """Return whether this is a W3C ``traceparent``."""
    return isinstance(value, str) and _TRACE.fullmatch(value) is not None


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a recorded message: all that travels with it besides its arguments.

    It is passed around as one value. Make one by :meth:`new`, :meth:`delivered` or :meth:`read`, and derive the next one by
    :meth:`copy_of`, :meth:`next_attempt` or :func:`dataclasses.replace`.

    Attributes:
        message_id: The message id.
        task_name: The task that the id belongs to.
        task_id: The Celery id that the message was published under. With ``task_name`` it shows whether a run forwards its own
            message, or a user copied the headers to another call.
        fingerprint: SHA-256 of the canonical arguments; ``None`` if they are not compared.
        holds: How often this copy was held; each hold is longer than the one before.
        copied: Whether it was published although its message id was known. It then has a row of its own until its caller is answered:
            see :meth:`row_of_its_own`.
        original_task_id: The Celery id first sent under the message id, if it is another one. A body's calls are identified by it.
        worker_lost_retries: How many of the message's retries were sent because a worker was lost. Such a retry makes the same calls as the
            lost attempt.
        rejected: How often it was rejected before its consumer published it again. Publishing resets RabbitMQ's own count.
        trace: The span in which the message was sent, if one of the app's hooks traces; see :class:`~celery_idempotent.hooks.TracingHook`.
        call: The name of a call whose Celery id was sent before, such as a frozen signature in a second canvas. Its callbacks, and the
            rest of its canvas, still have to run. ``None`` for all other messages.
    """

    message_id: str
    task_name: str
    task_id: str
    fingerprint: str | None = None
    holds: int = 0
    copied: bool = False
    original_task_id: str | None = None
    worker_lost_retries: int = 0
    trace: str | None = None
    call: str | None = None
    rejected: int = 0

    @classmethod
    def read(cls, headers: Mapping[str, Any] | None) -> Header | None:
        """Return our header from a message's headers; ``None`` if it is missing or malformed."""
        found = headers.get(HEADER) if isinstance(headers, Mapping) else None
        if not isinstance(found, Mapping):
            return None
        message_id, task_name, task_id = (found.get(name) for name in ("message_id", "task", "task_id"))
        if not (is_text(message_id) and is_text(task_name) and is_text(task_id)):
            return None
        fingerprint, holds, first, lost = map(found.get, ("fingerprint", "holds", "first", "lost"))
        trace, call = map(found.get, ("trace", "call"))
        return cls(
            message_id,
            task_name,
            task_id,
            fingerprint if is_text(fingerprint, longest=FINGERPRINT) else None,
            holds if isinstance(holds, int) and holds > 0 else 0,
            found.get("copied") is True,
            first if is_text(first) else None,
            lost if isinstance(lost, int) and lost > 0 else 0,
            trace if trace is not None and is_trace(trace) else None,
            call if is_text(call) else None,
            rejected if isinstance(rejected := found.get("rejected"), int) and rejected > 0 else 0,
        )

    @classmethod
    def new(cls, key: MessageKey, task_id: str, fingerprint: str | None = None, *, trace: str | None = None) -> Header:
        """Return the header for the first publication of a message."""
        return cls(key.message_id, key.task_name, task_id, fingerprint, trace=trace)

    @classmethod
    def delivered(cls, key: MessageKey, task_id: str, headers: Mapping[str, Any] | None) -> Header | None:
        """Return the header of a delivered message; ``None`` if its producer sent none, or sent another task's."""
        sent = cls.read(headers)
        if sent is None or sent.task_name != key.task_name:
            return None
        header = replace(sent, message_id=key.message_id, task_id=task_id)
        # A header of another message says nothing about the history of this one.
        return (
            header
            if sent.task_id == task_id
            else replace(header, original_task_id=None, worker_lost_retries=0, trace=None, call=None, rejected=0)
        )

    def copy_of(self, original_task_id: str, call: str | None = None) -> Header:
        """Return the header of a copy: a message published although its message id is known.

        Args:
            original_task_id: The Celery id first sent under that message id.
            call: The name of the call, if the copy's Celery id was sent before.
        """
        return replace(
            self,
            copied=True,
            original_task_id=None if original_task_id == self.task_id else original_task_id,
            call=call,
        )

    def next_attempt(self, *, lost: bool = False) -> Header:
        """Return the header of the message's retry.

        Args:
            lost: Whether the reason is a lost worker. The retry then makes the same calls as the lost attempt.
        """
        return replace(self, holds=0, copied=False, call=None, worker_lost_retries=self.worker_lost_retries + lost)

    def write(self, headers: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the headers with this one added."""
        header: dict[str, str | int] = {
            "message_id": self.message_id,
            "task": self.task_name,
            "task_id": self.task_id,
        }
        if self.fingerprint is not None:
            header["fingerprint"] = self.fingerprint
        if self.holds:
            header["holds"] = self.holds
        if self.copied:
            header["copied"] = True
        if self.original_task_id is not None:
            header["first"] = self.original_task_id
        if self.worker_lost_retries:
            header["lost"] = self.worker_lost_retries
        if self.trace is not None:
            header["trace"] = self.trace
        if self.call is not None:
            header["call"] = self.call
        if self.rejected:
            header["rejected"] = self.rejected
        return {**(headers or {}), HEADER: header}

    def belongs_to(self, task_name: str, task_id: str | None) -> bool:
        """Return whether a call with this header forwards the header's own message."""
        return self.task_name == task_name and self.task_id == task_id

    @property
    def key(self) -> MessageKey:
        """The key of the message's row."""
        return MessageKey(self.message_id, self.task_name)

    @property
    def original_id(self) -> str:
        """The Celery id first sent under the message id."""
        return self.original_task_id or self.task_id

    @property
    def row_of_its_own(self) -> MessageKey:
        """The key of a copy's own row: its task id, or the name of its call if that task id was sent before.

        The row under the message id keeps the first message. Without a row of its own, a copy that the broker loses would leave its
        caller, and the rest of its chain or chord, without an answer.
        """
        return MessageKey(self.call or self.task_id, self.task_name)
