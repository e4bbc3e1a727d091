"""A broker as a bag of copies: any may come next, come twice, or never."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from celery.app.task import Context
from kombu.exceptions import OperationalError

from celery_idempotent import IdempotentTask

__all__ = ["Broker", "Copy", "Mood"]


class Mood(StrEnum):
    """How a broker takes a publication."""

    WELL = "well"
    DOWN = "down"  # it takes nothing, and says so
    MUTE = "mute"  # it takes the message, and says that it did not


@dataclass(eq=False)
class Copy:
    """A copy of a message.

    Attributes:
        task: The task it is for.
        task_id: Its Celery id.
        message_id: The property; every producer of the model sets it.
        args: Positional arguments.
        headers: Custom headers, where the guard's header is.
        retries: Celery's count.
        link: Signatures that wait on it.
        ignore_result: Whether nobody wants the result.
        due: The model's time at which it may run.
        tag: Its delivery tag, which a restored copy has again, as on Redis.
    """

    task: IdempotentTask
    task_id: str
    message_id: str
    args: Any
    headers: Mapping[str, Any] = field(default_factory=dict)
    retries: int = 0
    link: Any = None
    ignore_result: bool = False
    due: float = 0.0
    tag: int = 0

    def request(self, hostname: str) -> Context:
        """Return the request that a worker traces."""
        return Context(
            id=self.task_id,
            args=self.args,
            kwargs={},
            retries=self.retries,
            headers=dict(self.headers),
            properties={"message_id": self.message_id},
            delivery_info={"exchange": "", "routing_key": "celery"},
            hostname=hostname,
            callbacks=self.link,
            ignore_result=self.ignore_result,
            called_directly=False,
            is_eager=False,
        )

    def __str__(self) -> str:
        return f"{self.message_id}/{self.task_id} retries={self.retries} tag={self.tag}"


class Broker:
    """What was published and is not acknowledged."""

    def __init__(self) -> None:
        self.ready: list[Copy] = []
        self.unacked: dict[int, Copy] = {}
        self.mood = Mood.WELL
        self._tags = 0

    def due(self, now: float) -> list[Copy]:
        """Return the copies that may run."""
        return [copy for copy in self.ready if copy.due <= now]

    def publish(self, task: IdempotentTask, args: Any, options: Mapping[str, Any], now: float) -> None:
        """Take what ``Task.publish`` is given."""
        mood, self.mood = self.mood, Mood.WELL
        if mood is Mood.DOWN:
            raise OperationalError("the broker is down")
        assert not options.get("eta"), "the model knows countdowns only"
        headers = dict(options.get("headers") or {})
        link = options.get("link")
        self.add(
            Copy(
                task,
                options["task_id"],
                options["message_id"],
                list(args),
                # As on the wire: what is among the headers by a name of Celery's is what Celery's consumer reads.
                ignore_result=bool(headers.pop("ignore_result", options.get("ignore_result"))),
                headers=headers,
                retries=options.get("retries") or 0,
                link=link if link is None or isinstance(link, list) else [link],
                due=now + (options.get("countdown") or 0),
            )
        )
        if mood is Mood.MUTE:
            raise OperationalError("the broker does not answer")

    def add(self, copy: Copy) -> None:
        """One more copy, with a tag of its own."""
        self._tags += 1
        self.ready.append(replace(copy, tag=self._tags))

    def deliver(self, copy: Copy) -> None:
        """Hand a copy to a worker."""
        self.ready.remove(copy)
        self.unacked[copy.tag] = copy

    def ack(self, copy: Copy) -> None:
        """Forget a copy, so that it is not delivered again."""
        self.unacked.pop(copy.tag, None)

    def restore(self, copy: Copy) -> None:
        """Deliver an unacknowledged copy again, whether its worker lives or not; one that was acknowledged is gone."""
        if self.unacked.pop(copy.tag, None) is not None:
            self.ready.append(replace(copy))
