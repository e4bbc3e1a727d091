"""Which tick of an entry is due, so that two beats name the same tick alike.

A calendar has due times that all beats know: a crontab, and any schedule whose class this module does not know. Each due time is a tick. An
interval has none, since each beat counts from its own last run: its ticks are told apart by the time between them. So are those of a solar
entry, whose due time comes out a little different in each calculation.
"""

# ruff: noqa: D102 - the verbs of a tick are documented in `Tick`

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from celery import schedules
from celery.utils.time import maybe_make_aware, timezone

if TYPE_CHECKING:
    from celery.beat import ScheduleEntry

__all__ = ["CalendarTick", "IntervalTick", "Last", "SolarTick", "Tick", "latest_after", "latest_of_crontab", "tick_of"]

#: The part of an interval that must lie between two ticks. The rest is for clocks and timers that are not exact.
_TOLERATED = 0.9

#: Seconds for which a tick that comes too early waits at most, and the part of its interval.
_LONGEST_WAIT, _WORTH_WAITING = 1.0, 0.2

#: The least time between two solar events of one kind.
_HALF_A_DAY = timedelta(hours=12)

#: Where to begin with an entry that has never run.
_NEVER = timedelta(days=366)

#: Days to look back for the last day of a crontab: 29 February may be 8 years ago, and on one day of the week 40.
_LONGEST_AGO = 41 * 366


@dataclass(frozen=True, slots=True)
class Last:
    """The tick that was sent last, by the store's clock.

    Attributes:
        sent: When it was sent.
        now: The store's clock.
        at: Its due time as text; ``None`` if that is not known any more.
    """

    sent: datetime
    now: datetime
    at: str | None


@dataclass(frozen=True, slots=True)
class Tick(ABC):
    """A tick that is due.

    Attributes:
        entry: The entry's name.
        at: The due time, or for an interval the time at which it was found due, by the beat's clock; for people to read.
        keep: Seconds for which the tick is remembered after it was sent; ``None`` for as long as the queue log keeps rows.
    """

    entry: str
    at: str
    keep: float | None

    @property
    @abstractmethod
    def name(self) -> str:
        """What all beats call this tick, and the ticks that it is compared with."""

    @abstractmethod
    def is_new(self, last: Last) -> bool:
        """Return whether this is another tick than the last one of its name."""

    def new_in(self, last: Last) -> float | None:  # noqa: ARG002 - for intervals
        """Return the seconds after which it is, if that is so soon that it is worth waiting for; ``None`` if not."""
        return None


@dataclass(frozen=True, slots=True)
class CalendarTick(Tick):
    """A tick with a due time of its own."""

    @property
    def name(self) -> str:
        return f"{self.entry}:{self.at}"

    def is_new(self, last: Last) -> bool:  # noqa: ARG002 - the name has the due time
        return False


@dataclass(frozen=True, slots=True)
class IntervalTick(Tick):
    """A tick of an interval.

    Attributes:
        keep: Seconds that must lie between two.
    """

    @property
    def name(self) -> str:
        return self.entry

    def is_new(self, last: Last) -> bool:
        # The entry may have got a shorter interval, or the clock may have been set back.
        passed = (last.now - last.sent).total_seconds()
        return self.keep is None or passed >= self.keep or passed < 0

    def new_in(self, last: Last) -> float | None:
        # A beat counts from before its last publication, and the log from after it. If that took more than a tenth of the interval, every
        # other tick would come too early.
        left = (self.keep or 0.0) - (last.now - last.sent).total_seconds()
        return left if left <= min(_WORTH_WAITING * (self.keep or 0.0), _LONGEST_WAIT) else None


@dataclass(frozen=True, slots=True)
class SolarTick(Tick):
    """A tick of a solar entry."""

    @property
    def name(self) -> str:
        return self.entry

    def is_new(self, last: Last) -> bool:
        try:
            before = last.sent if last.at is None else min(datetime.fromisoformat(last.at), last.sent)
        except (TypeError, ValueError):
            before = last.sent
        return datetime.fromisoformat(self.at) - before >= _HALF_A_DAY


def tick_of(entry: ScheduleEntry, *, retention: float) -> Tick:
    """Return the latest tick of an entry that is due.

    Args:
        entry: The entry.
        retention: Seconds for which the queue log keeps rows. A tick that is the latest one for longer is kept for longer.
    """
    schedule = entry.schedule
    if isinstance(schedule, schedules.schedule):
        return IntervalTick(entry.name, _text(_now(schedule)), _TOLERATED * schedule.run_every.total_seconds())
    now = _now(schedule)
    if isinstance(schedule, schedules.crontab):
        wall = now.astimezone(timezone.get_timezone(schedule.tz)).replace(tzinfo=None)
        at = latest_of_crontab(schedule, wall).isoformat(timespec="minutes")
        return CalendarTick(entry.name, at, _keep(schedule, now, retention))
    start = now - _NEVER if entry.last_run_at is None else maybe_make_aware(entry.last_run_at).astimezone(UTC)
    due = latest_after(_following(schedule, now), start, now)
    kind = SolarTick if isinstance(schedule, schedules.solar) else CalendarTick
    return kind(entry.name, _text(due), _keep(schedule, now, retention))


def latest_of_crontab(crontab: schedules.crontab, wall: datetime) -> datetime:
    """Return the latest time, at or before this one, that a crontab matches.

    By the clock on the wall, so that the two hours of a night that has one of them twice have the same due times: a beat that is started
    in the second one repeats nothing.

    Args:
        crontab: The schedule.
        wall: Local time in the schedule's time zone, without that.
    """
    hours, minutes = sorted(crontab.hour, reverse=True), sorted(crontab.minute, reverse=True)
    for ago in range(_LONGEST_AGO):
        day = wall.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=ago)
        if not (
            day.month in crontab.month_of_year
            and day.day in crontab.day_of_month
            and day.isoweekday() % 7 in crontab.day_of_week
        ):
            continue
        for hour in hours:
            for minute in minutes:
                moment = day.replace(hour=hour, minute=minute)
                if moment <= wall:
                    return moment
    return wall.replace(second=0, microsecond=0)  # it matches no day, so it is never due


def latest_after(following: Callable[[datetime], datetime | None], start: datetime, now: datetime) -> datetime:
    """Return the latest due time, at or before now, of a schedule that only tells what follows a moment.

    Args:
        following: Returns the first due time after a moment; ``None`` if there is none.
        start: A moment before it.
        now: The present.
    """
    due = following(start)
    if due is None or due > now:
        return now
    until = now
    while True:
        later = following(due + timedelta(seconds=1))
        if later is None or not due < later <= now:
            return due
        # There may be thousands, so go on from the middle of what is left.
        middle = later + (until - later) / 2
        found = following(middle)
        if found is not None and later < found <= now:
            due = found
        else:
            due, until = later, middle


def _following(schedule: schedules.BaseSchedule, now: datetime) -> Callable[[datetime], datetime | None]:
    # Of a schedule, what remains is counted from its own clock: that has to stand still.
    still = object.__new__(type(schedule))
    still.__dict__.update(schedule.__dict__, nowfun=lambda: now)

    def following(moment: datetime) -> datetime | None:
        remaining = still.remaining_estimate(moment)
        return None if remaining is None else now + remaining

    return following


def _keep(schedule: schedules.BaseSchedule, now: datetime, retention: float) -> float | None:
    """Return for how long a tick may be the latest one, if that is longer than rows are kept."""
    remaining: Any = schedule.remaining_estimate(now)
    keep = 0.0 if remaining is None else remaining.total_seconds() + timedelta(days=1).total_seconds()
    return keep if keep > retention else None


def _now(schedule: schedules.BaseSchedule) -> datetime:
    now: datetime = schedule.maybe_make_aware(schedule.now()).astimezone(UTC)
    return now


def _text(moment: datetime) -> str:
    """Return a moment in whole seconds."""
    return (moment.astimezone(UTC) + timedelta(seconds=0.5)).replace(microsecond=0).isoformat()
