"""Ticks on every store: of many beats one takes each, and what a dead one leaves is sent by another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from celery import Celery

from celery_idempotent import QueueLog
from celery_idempotent.beat.due import CalendarTick, IntervalTick, SolarTick, Tick
from celery_idempotent.beat.tick_log import Lapsed, SentBefore, TakenTick, TickCall, TickLog
from tests.support.deployment import unique
from tests.support.stores import mariadb_store, postgresql_store, sqlite_store
from tests.support.waiting import wait_until

CALL = TickCall("entry", "task", ["entry"], {"amount": 5}, {"queue": "slow"})
BEATS = 8


@pytest.fixture(params=["sqlite", "postgresql", "mariadb", "redis"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Celery]:
    app = Celery(unique("shop"), set_as_current=False)
    with ExitStack() as stack:
        match request.param:
            case "sqlite":
                url = sqlite_store(tmp_path)
            case "postgresql":
                url = stack.enter_context(postgresql_store(request.getfixturevalue("postgresql_url")))
            case "mariadb":
                url = stack.enter_context(mariadb_store(request.getfixturevalue("mariadb_url")))
            case _:
                url = request.getfixturevalue("private_redis").url
        app.conf.idempotent_store = url
        QueueLog(app).init()
        yield app
        app.close()


def beat(app: Celery, lease: float = 30.0) -> TickLog:
    return TickLog(QueueLog.of(app), lease=lease)


def take(log: TickLog, tick: Tick) -> TakenTick:
    taken = log.take(tick, CALL)
    assert isinstance(taken, TakenTick)
    return taken


def race(app: Celery, tick: Tick) -> list[TakenTick]:
    """Let many beats take one tick; return what they got of it."""
    with ThreadPoolExecutor(BEATS) as pool:
        answers = list(pool.map(lambda _: beat(app).take(tick, CALL), range(BEATS)))
    assert {type(answer) for answer in answers} <= {TakenTick, SentBefore}
    return [answer for answer in answers if isinstance(answer, TakenTick)]


def end(app: Celery, taken: TakenTick) -> None:
    taken.sent = time.monotonic()
    beat(app).end(taken)


def test_of_many_beats_one_takes_a_due_time(app: Celery) -> None:
    due = CalendarTick("nightly", "2026-11-30T03:00", None)
    (taken,) = race(app, due)
    end(app, taken)
    assert race(app, due) == []
    assert len(race(app, CalendarTick("nightly", "2026-12-01T03:00", None))) == 1


def test_of_many_beats_one_takes_an_interval_when_it_is_over(app: Celery) -> None:
    tick = IntervalTick("often", "2026-11-30T03:00:00+00:00", 3.0)  # longer than two races on a busy machine
    (taken,) = race(app, tick)
    assert race(app, tick) == []
    end(app, taken)
    ended = time.monotonic()
    assert race(app, tick) == []
    # A beat that has the entry with another interval by now.
    assert race(app, IntervalTick("often", tick.at, 60.0)) == []

    wait_until(lambda: len(race(app, tick)) == 1, timeout=20)

    assert 3.0 <= time.monotonic() - ended < 15


def test_of_many_beats_one_takes_an_interval_that_got_shorter(app: Celery) -> None:
    end(app, take(beat(app), IntervalTick("often", "2026-11-30T03:00:00+00:00", 3600.0)))
    shorter = IntervalTick("often", "2026-11-30T03:00:00+00:00", 0.1)
    time.sleep(0.15)
    assert len(race(app, shorter)) == 1


def test_of_many_beats_one_takes_a_solar_event(app: Celery) -> None:
    sunset = datetime.now(UTC) - timedelta(hours=20)
    (taken,) = race(app, SolarTick("sunset", sunset.isoformat(timespec="seconds"), None))
    end(app, taken)
    again = sunset + timedelta(seconds=3)
    assert race(app, SolarTick("sunset", again.isoformat(timespec="seconds"), None)) == []
    tomorrow = sunset + timedelta(hours=20)
    assert len(race(app, SolarTick("sunset", tomorrow.isoformat(timespec="seconds"), None))) == 1


def test_a_tick_that_was_left_is_taken_over_by_one(app: Celery) -> None:
    due = CalendarTick("nightly", "2026-11-30T03:00", None)
    left = take(beat(app, lease=0.2), due)
    wait_until(lambda: list(beat(app).lapsed()), timeout=10)
    (row,) = beat(app).lapsed()
    assert isinstance(beat(app).take(due, CALL), Lapsed)

    with ThreadPoolExecutor(BEATS) as pool:
        answers = list(pool.map(lambda _: beat(app).take_over(row), range(BEATS)))

    (taken,) = (answer for answer in answers if answer is not None)
    assert (taken.call, taken.task_id, taken.at, taken.again) == (CALL, left.task_id, due.at, True)
    assert list(beat(app).lapsed()) == []
    end(app, taken)
    # The one that stood still has lost it: its end is not written over this one.
    end(app, left)
    assert isinstance(beat(app).take(due, CALL), SentBefore)


def test_a_tick_that_is_given_back_is_there_at_once(app: Celery) -> None:
    taken = take(beat(app), CalendarTick("nightly", "2026-11-30T03:00", None))
    beat(app).give_back(taken)
    assert [row.task_id for row in beat(app).lapsed()] == [taken.task_id]


def test_a_tick_that_failed_is_not_sent_again(app: Celery) -> None:
    due = CalendarTick("nightly", "2026-11-30T03:00", None)
    beat(app).fail(take(beat(app), due), ValueError("no"))
    assert race(app, due) == []
    assert list(beat(app).lapsed()) == []


def test_the_ticks_of_other_apps_are_left_alone(app: Celery) -> None:
    other = Celery(unique("other"), set_as_current=False)
    QueueLog(other, store=QueueLog.of(app).store)
    take(beat(other, lease=0.1), CalendarTick("nightly", "2026-11-30T03:00", None))
    wait_until(lambda: list(beat(other).lapsed()), timeout=10)
    assert list(beat(app).lapsed()) == []
