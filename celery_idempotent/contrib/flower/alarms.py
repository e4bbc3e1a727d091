"""Alarms for an operator: what fails or is stuck, since when, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from celery_idempotent.contrib.flower.snapshot import LISTED, Glance
from celery_idempotent.core.records import ABANDONED, Row
from celery_idempotent.settings import Settings

__all__ = ["Alarm", "alarms", "is_abandoned"]

#: The age of a failure that is current, and of one that is recent.
_NOW, _LATELY = timedelta(minutes=15), timedelta(hours=1)

#: Younger messages are not alarming: they may be on their way.
_BRIEF = timedelta(seconds=5)

#: Recovery passes that a message may wait for in vain, and the least number of seconds; as in `doctor`.
_STEPS_IN_VAIN, _AT_LEAST = 5, 120.0


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm.

    Attributes:
        level: ``danger`` if it does not go away by itself.
        what: The problem.
        since: Since when, or when last.
        remedy: What to do, or what will happen.
        see: The part of the page that shows it.
    """

    level: Literal["danger", "warning"]
    what: str
    since: datetime | None
    remedy: str
    see: str


def alarms(glance: Glance, failed: Sequence[Row], waiting: Sequence[Row], settings: Settings) -> list[Alarm]:
    """Return the alarms, the worst first.

    Args:
        glance: The state of the queue log.
        failed: Failed messages, the latest first.
        waiting: Due messages that the broker has, without held copies, which wait for a running message.
        settings: The app's settings, which say how long recovery may take.
    """
    found = [
        *_off(settings),
        *_stuck(glance, settings),
        *_failing(glance.read_at, failed),
        *_behind(glance.read_at, waiting, settings),
    ]
    return sorted(found, key=lambda alarm: alarm.level != "danger")


def _off(settings: Settings) -> Iterator[Alarm]:
    if not settings.enabled:
        yield Alarm(
            "danger",
            "The guard is off: idempotent_enabled is False",
            None,
            "Each repeated call and each copy runs. Set it to True, and restart workers and producers, when the incident or the load test is over.",
            "waiting",
        )


def _stuck(glance: Glance, settings: Settings) -> Iterator[Alarm]:
    patience = timedelta(seconds=max(_AT_LEAST, _STEPS_IN_VAIN * settings.recovery_interval))
    health = glance.health
    if health.lapsed_since is not None and glance.read_at - health.lapsed_since > _BRIEF:
        overdue = glance.read_at - health.lapsed_since > patience
        number = _many(len(glance.lapsed) or 1, "message whose worker died is", "messages whose workers died are")
        yield Alarm(
            "danger" if overdue else "warning",
            f"{number} not taken over",
            health.lapsed_since,
            "Recovery does not run: is a worker up, with an idempotent_recovery_interval? `celery -A proj idempotent recover` recovers it now."
            if overdue
            else "A worker's next recovery pass publishes it again, or fails it as abandoned.",
            "running",
        )
    if health.unsent_since is not None and glance.read_at - health.unsent_since > _BRIEF:
        overdue = glance.read_at - health.unsent_since > patience
        number = _many(len(glance.unsent) or 1, "message is", "messages are")
        yield Alarm(
            "danger" if overdue else "warning",
            f"{number} recorded and not handed to the broker",
            health.unsent_since,
            "Recovery does not publish it: are the broker and a worker up? `celery -A proj idempotent recover` publishes it now."
            if overdue
            else "A worker's next recovery pass publishes it.",
            "waiting",
        )


def _failing(now: datetime, failed: Sequence[Row]) -> Iterator[Alarm]:
    lately = [row for row in failed if row.processed_timestamp is not None and now - row.processed_timestamp < _LATELY]
    if not lately:
        return
    last = lately[0].processed_timestamp
    assert last is not None  # `failed` has only messages that ended
    kinds = Counter(_kind(row) for row in lately).most_common(3)
    yield Alarm(
        "danger" if now - last < _NOW else "warning",
        f"{_many(len(lately), 'message has', 'messages have')} failed within the last hour",
        last,
        ", ".join(f"{number} {kind}" for kind, number in kinds),
        "failed",
    )


def _kind(row: Row) -> str:
    """Return the type of an error, or why there is none."""
    return (row.error or "no error").partition(":")[0].rpartition(".")[2][:60]


def _behind(now: datetime, waiting: Sequence[Row], settings: Settings) -> Iterator[Alarm]:
    if not waiting:
        return
    oldest = min(waiting, key=lambda row: row.waiting_since)
    if now - oldest.waiting_since > timedelta(seconds=settings.lost_after):
        where = f" on queue {oldest.queue}" if oldest.queue else ""
        yield Alarm(
            "warning",
            f"The oldest message that is due waits{where}",
            oldest.waiting_since,
            "Do workers consume from the queue, and fast enough? If the broker has lost the message, it is published again after later ones "
            "were claimed.",
            "waiting",
        )


def _many(number: int, one: str, more: str) -> str:
    if number == 1:
        return f"1 {one}"
    return f"{number}{' or more' if number >= LISTED else ''} {more}"


def is_abandoned(row: Row) -> bool:
    """Return whether a message failed because its owner's lease ran out."""
    return row.error is not None and row.error.startswith(ABANDONED.partition(":")[0])
