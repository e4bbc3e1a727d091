"""Which tick is due: all beats must give it the same name, whatever they remember."""

# ruff: noqa: DTZ001 - a crontab is matched against the clock on the wall

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from celery.beat import ScheduleEntry
from celery.schedules import BaseSchedule, crontab, schedule, solar

from celery_idempotent.beat.due import IntervalTick, Last, SolarTick, Tick, latest_after, latest_of_crontab, tick_of

WEEK = 7 * 86400.0
NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)


@pytest.fixture
def app() -> Celery:
    return Celery("shop", set_as_current=False)


def due(app: Celery, of: BaseSchedule, now: datetime, last_run: datetime | None = None) -> Tick:
    of.nowfun = lambda: now
    entry = ScheduleEntry(name="nightly", task="t", schedule=of, app=app, last_run_at=last_run or now)
    return tick_of(entry, retention=WEEK)


# -- crontab -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_latest_time_of_a_crontab_is_found(seed: int) -> None:
    """Against a search minute by minute."""
    dice = random.Random(seed)

    def some(of: int, first: int = 0) -> set[int]:
        return set(dice.sample(range(first, first + of), dice.randint(1, of)))

    cron = crontab(minute=some(60), hour=some(24), day_of_week=some(7), day_of_month=some(28, 1))
    wall = datetime(2026, 1, 1) + timedelta(minutes=dice.randint(0, 60 * 24 * 365), seconds=dice.randint(0, 59))

    moment = wall.replace(second=0)
    while not (
        moment.minute in cron.minute
        and moment.hour in cron.hour
        and moment.isoweekday() % 7 in cron.day_of_week
        and moment.day in cron.day_of_month
    ):
        moment -= timedelta(minutes=1)
    assert latest_of_crontab(cron, wall) == moment


def test_a_leap_day_is_found_years_later() -> None:
    cron = crontab(minute=30, hour=6, day_of_month=29, month_of_year=2)
    assert latest_of_crontab(cron, datetime(2027, 12, 31)) == datetime(2024, 2, 29, 6, 30)


def test_beats_that_remember_different_runs_name_one_tick(app: Celery) -> None:
    at = NOON.replace(hour=3, second=7)
    remembered = [at - timedelta(hours=1), at - timedelta(days=40), at - timedelta(seconds=1)]
    names = {due(app, crontab(minute=0, hour=3), at, last).name for last in remembered}
    assert names == {"nightly:2026-11-30T03:00"}


def test_each_due_time_of_a_crontab_is_a_tick(app: Celery) -> None:
    names = [due(app, crontab(minute="*/15"), NOON + timedelta(minutes=15 * n, seconds=1)).name for n in range(4)]
    assert names == [f"nightly:2026-11-30T12:{minute:02}" for minute in (0, 15, 30, 45)]


def test_a_clock_set_back_names_an_earlier_tick(app: Celery) -> None:
    first, back = NOON + timedelta(minutes=30), NOON + timedelta(minutes=10)
    assert due(app, crontab(minute="*/15"), back).name == "nightly:2026-11-30T12:00"
    assert due(app, crontab(minute="*/15"), first).name == "nightly:2026-11-30T12:30"


def test_the_crontab_counts_in_the_apps_timezone(app: Celery) -> None:
    app.conf.timezone = "Asia/Kolkata"
    assert due(app, crontab(minute=0, hour=3), NOON).at == "2026-11-30T03:00"
    assert due(app, crontab(minute=0, hour=18), NOON).at == "2026-11-29T18:00"  # it is 17:30 there


def test_the_hour_that_comes_twice_is_one(app: Celery) -> None:
    """In Berlin, 02:30 comes at 00:30 and at 01:30 UTC; a beat that starts between the two must not repeat it."""
    app.conf.timezone = "Europe/Berlin"
    night = [datetime(2026, 10, 25, hour, 30, 1, tzinfo=UTC) for hour in (0, 1)]
    assert [moment.astimezone(ZoneInfo("Europe/Berlin")).hour for moment in night] == [2, 2]
    assert {due(app, crontab(minute=30, hour=2), moment).at for moment in night} == {"2026-10-25T02:30"}


def test_the_hour_that_is_left_out_is_a_tick_too(app: Celery) -> None:
    app.conf.timezone = "Europe/Berlin"
    later = datetime(2026, 3, 29, 1, 30, 1, tzinfo=UTC)  # 03:30 there, where 02:30 does not come
    assert due(app, crontab(minute=30, hour=2), later).at == "2026-03-29T02:30"


def test_a_tick_is_kept_for_as_long_as_it_is_the_latest(app: Celery) -> None:
    monthly = due(app, crontab(minute=0, hour=0, day_of_month=1), datetime(2026, 12, 1, tzinfo=UTC))
    assert monthly.keep == pytest.approx(32 * 86400)  # to the next one, and a day
    assert due(app, crontab(minute=0), NOON).keep is None


# -- intervals ---------------------------------------------------------------------------------------------------------


def last(ago: float, at: datetime | None = None) -> Last:
    return Last(sent=NOON - timedelta(seconds=ago), now=NOON, at=None if at is None else at.isoformat())


def test_ticks_of_an_interval_are_told_apart_by_the_time_between(app: Celery) -> None:
    tick = due(app, schedule(timedelta(seconds=100)), NOON)
    assert isinstance(tick, IntervalTick)
    assert tick.name == "nightly"
    assert [tick.is_new(last(ago)) for ago in (0, 89, 90, 5000)] == [False, False, True, True]


def test_a_store_whose_clock_was_set_back_stops_no_interval(app: Celery) -> None:
    assert due(app, schedule(timedelta(seconds=100)), NOON).is_new(last(-3600))


# -- solar -------------------------------------------------------------------------------------------------------------


def test_two_calculations_of_a_sunset_are_one_tick(app: Celery) -> None:
    """The event comes out a little different from each start."""
    evening = NOON + timedelta(hours=9)
    ticks = [due(app, solar("sunset", 52.5, 13.4), evening, evening - ago) for ago in map(hours, (8, 30, 77.7))]
    moments = [datetime.fromisoformat(tick.at) for tick in ticks]
    assert {type(tick) for tick in ticks} == {SolarTick}
    assert {tick.name for tick in ticks} == {"nightly"}
    assert max(moments) - min(moments) < timedelta(minutes=1)
    assert NOON < min(moments) < evening
    for first in moments:
        seen = Last(sent=evening, now=evening, at=first.isoformat())
        assert not any(tick.is_new(seen) for tick in ticks)


@pytest.mark.parametrize(("apart", "new"), [(0.5, False), (3600, False), (-3600, False), (13 * 3600, True)])
def test_solar_events_are_told_apart_by_half_a_day(apart: float, new: bool) -> None:
    tick = SolarTick("nightly", (NOON + timedelta(seconds=apart)).isoformat(), None)
    assert tick.is_new(Last(sent=NOON + hours(1), now=NOON + hours(14), at=NOON.isoformat())) is new


def test_each_sunset_is_a_tick(app: Celery) -> None:
    sunset = solar("sunset", 52.5, 13.4)
    before: Last | None = None
    for day in range(100):
        now = NOON + timedelta(days=day, hours=9)
        tick = due(app, sunset, now, now - timedelta(hours=20))
        assert before is None or tick.is_new(before)
        before = Last(sent=now, now=now, at=tick.at)


def test_a_sunset_that_was_sent_late_does_not_swallow_the_next(app: Celery) -> None:
    """A beat that was down sends yesterday's an hour before today's."""
    yesterday = due(app, solar("sunset", 52.5, 13.4), NOON + hours(2), NOON - hours(22))
    today = due(app, solar("sunset", 52.5, 13.4), NOON + hours(4), NOON + hours(2))
    seen = Last(sent=NOON + hours(2), now=NOON + hours(4), at=yesterday.at)
    assert today.is_new(seen)


def test_a_clock_that_was_a_year_ahead_stops_no_sunset(app: Celery) -> None:
    seen = Last(sent=NOON - hours(24), now=NOON, at=(NOON + timedelta(days=365)).isoformat())
    assert due(app, solar("sunset", 52.5, 13.4), NOON + hours(9), NOON).is_new(seen)


def hours(number: float) -> timedelta:
    return timedelta(hours=number)


# -- schedules of others -----------------------------------------------------------------------------------------------


class Every(BaseSchedule):  # type: ignore[misc]
    """Each full period since the epoch."""

    def __init__(self, period: timedelta, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.period = period

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        epoch = datetime(1970, 1, 1, tzinfo=UTC)
        now: datetime = self.now()
        return epoch + ((last_run_at - epoch) // self.period + 1) * self.period - now


@pytest.mark.parametrize("ago", [1, 3599, 86400, 86400 * 300])
def test_a_schedule_of_another_class_has_the_same_ticks(app: Celery, ago: float) -> None:
    now = NOON + timedelta(minutes=7, seconds=3)
    tick = due(app, Every(timedelta(minutes=5)), now, now - timedelta(minutes=3, seconds=ago))
    assert tick.name == "nightly:2026-11-30T12:05:00+00:00"


def test_a_clock_that_goes_on_meanwhile_changes_no_due_time(app: Celery) -> None:
    """What a schedule says remains is counted from its own clock, at another moment than the beat's."""
    clock = iter(NOON + timedelta(minutes=7, seconds=0.7 * number) for number in range(1000))
    entry = ScheduleEntry(
        name="nightly",
        task="t",
        schedule=Every(timedelta(minutes=5), nowfun=lambda: next(clock)),
        app=app,
        last_run_at=NOON - hours(3),
    )
    assert {tick_of(entry, retention=WEEK).name for _ in range(5)} == {"nightly:2026-11-30T12:05:00+00:00"}


def test_the_latest_of_many_is_found_in_few_steps() -> None:
    asked = 0

    def following(moment: datetime) -> datetime | None:
        nonlocal asked
        asked += 1
        return moment.replace(microsecond=0) + timedelta(seconds=5 - moment.second % 5)

    now = NOON + timedelta(seconds=3)
    assert latest_after(following, NOON - timedelta(days=3000), now) == NOON
    assert asked < 100


def test_a_schedule_without_an_end_of_its_own_is_due_now() -> None:
    assert latest_after(lambda _: None, NOON, NOON) == NOON
