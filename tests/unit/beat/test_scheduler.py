"""What a scheduler makes of outages, deaths, entries that change and tasks with ids of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from celery import Celery
from celery.beat import BeatLazyFunc, Scheduler
from celery.schedules import BaseSchedule, crontab
from kombu import Producer
from kombu.exceptions import OperationalError

from celery_idempotent import IdempotentTask
from celery_idempotent.beat import IdempotentScheduler, PersistentScheduler
from celery_idempotent.beat.due import CalendarTick, Tick
from celery_idempotent.beat.tick_log import TICKS
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, Row, RowFilter, Status
from celery_idempotent.errors import ConfigurationError, SchemaError, StoreUnavailableError
from tests.unit.beat.conftest import Killed, World


def start(world: World, entry: dict[str, Any], *, app: Celery | None = None, **settings: Any) -> IdempotentScheduler:
    """Start a beat with one entry, whose name its messages have as their first argument."""
    app = world.app() if app is None else app
    app.conf.update(beat_schedule={"entry": {"task": "plain", "schedule": crontab(), "args": ["entry"], **entry}})
    app.conf.update(settings)
    app.set_current()
    return IdempotentScheduler(app, max_interval=60)


def run(world: World, *beats: Scheduler, seconds: float) -> None:
    """Let beats run in turn, for some time."""
    end = world.now + timedelta(seconds=seconds)
    while world.now < end:
        for beat in beats:
            beat.app.set_current()
            while not beat.tick():
                world.advance(0.001)
        world.advance(0.5)


def ticks(world: World) -> list[Row]:
    return list(world.store.rows(RowFilter(task_name=TICKS, oldest_first=True)))


def sent(world: World) -> list[str]:
    return [task_id for _, _, task_id in world.published]


@dataclass
class Outage:
    """A verb of the store, or the broker, that raises while it is on."""

    error: BaseException
    on: bool = True
    asked: int = 0

    def before(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if self.on:
                self.asked += 1
                raise self.error
            return method(*args, **kwargs)

        return ask


# -- outages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["plain", "guarded"])
@pytest.mark.parametrize("error", [StoreUnavailableError("away"), SchemaError("missing")])
def test_a_tick_waits_for_the_store(
    world: World, monkeypatch: pytest.MonkeyPatch, task: str, error: BaseException
) -> None:
    beat = start(world, {"task": task})
    outage = Outage(error)
    monkeypatch.setattr(world.store, "claim", outage.before(world.store.claim))
    run(world, beat, seconds=50)
    assert outage.asked > 3
    assert sent(world) == []
    before = beat.schedule["entry"].last_run_at

    outage.on = False
    run(world, beat, seconds=5)

    assert len(sent(world)) == 1
    assert beat.schedule["entry"].last_run_at > before
    assert [row.key.message_id for row in ticks(world)] == ["beat:shop:entry:2026-11-30T03:00"]


def test_a_store_that_is_away_for_several_ticks_gets_the_latest(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    beat = start(world, {})
    outage = Outage(StoreUnavailableError("away"))
    monkeypatch.setattr(world.store, "claim", outage.before(world.store.claim))
    run(world, beat, seconds=200)
    outage.on = False
    run(world, beat, seconds=5)
    assert [row.key.message_id for row in ticks(world)] == ["beat:shop:entry:2026-11-30T03:02"]


def test_without_the_store_a_tick_is_sent_unguarded_if_that_is_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beat = start(world, {}, idempotent_on_store_error="run")
    monkeypatch.setattr(world.store, "claim", Outage(StoreUnavailableError("away")).before(world.store.claim))
    run(world, beat, seconds=35)
    assert len(sent(world)) == 1
    assert "is sent unguarded" in caplog.text


@pytest.mark.parametrize("task", ["plain", "guarded"])
def test_a_tick_waits_for_the_broker(world: World, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    first, second = start(world, {"task": task}), start(world, {"task": task})
    outage = Outage(OperationalError("refused"))
    monkeypatch.setattr(Producer, "publish", outage.before(Producer.publish))
    run(world, first, second, seconds=50)
    assert sent(world) == []
    assert outage.asked > 3

    outage.on = False
    run(world, first, second, seconds=15)

    (row,) = ticks(world)
    assert sent(world) == [row.task_id]
    assert row.status is Status.DONE


def test_a_tick_that_the_store_cannot_end_is_not_sent_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    beat = start(world, {})
    outage = Outage(StoreUnavailableError("away"))
    monkeypatch.setattr(world.store, "complete", outage.before(world.store.complete))
    run(world, beat, seconds=40)
    outage.on = False
    run(world, beat, seconds=15)
    assert len(sent(world)) == 1
    assert [row.status for row in ticks(world)] == [Status.DONE]


# -- deaths ------------------------------------------------------------------------------------------------------------


def die(world: World, beat: Scheduler, when: str) -> None:
    """Let a beat die at its next message, before or after the publication."""
    world.kill_at_next(when)
    with pytest.raises(Killed):
        run(world, beat, seconds=60)


@pytest.mark.parametrize("task", ["plain", "guarded"])
@pytest.mark.parametrize(("when", "copies"), [("before", 1), ("after", 2)])
def test_a_tick_of_a_dead_beat_is_sent_by_another(world: World, task: str, when: str, copies: int) -> None:
    schedule = {"task": task, "schedule": crontab(minute=0)}
    first, second = start(world, schedule), start(world, schedule)
    die(world, first, when)
    run(world, second, seconds=20)
    assert len(sent(world)) == copies - 1  # as long as the dead beat's lease lives

    run(world, second, seconds=40)

    (row,) = ticks(world)
    assert sent(world) == [row.task_id] * copies
    assert row.status is Status.DONE


def test_a_beat_that_starts_again_sends_its_own(world: World) -> None:
    die(world, start(world, {"schedule": crontab(minute=0)}), "before")
    run(world, start(world, {"schedule": crontab(minute=0)}), seconds=60)
    assert sent(world) == [row.task_id for row in ticks(world)]


def test_a_guarded_message_that_has_ended_is_not_sent_again(world: World) -> None:
    """Its id may be free again by then, and a message under it would run."""
    schedule = {"task": "guarded", "schedule": crontab(minute=0), "options": {"message_id": "m"}}
    first, second = start(world, schedule), start(world, schedule)
    die(world, first, "after")
    key = MessageKey("m", "guarded")
    row = world.store.find(key)
    assert row is not None
    claimed = world.store.claim(NewMessage(key, row.task_id), worker="w", lease=60, grace=0)
    assert isinstance(claimed, Claimed)
    assert world.store.complete(claimed.claim, result=None, unique_for=0.0)

    run(world, second, seconds=60)

    assert len(sent(world)) == 1
    assert [row.status for row in ticks(world)] == [Status.DONE]


def test_a_tick_keeps_its_arguments_and_options(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {
        "schedule": crontab(minute=0),
        "kwargs": {"amount": 5},
        "options": {"queue": "slow", "expires": 3600, "headers": {"tenant": "t"}, "priority": 3},
    }
    first, second = start(world, entry), start(world, {"schedule": crontab(minute=30)})
    die(world, first, "before")
    published: list[dict[str, Any]] = []
    publish = Producer.publish

    def note(self: Producer, body: Any, **options: Any) -> Any:
        published.append({"body": body, **options})
        return publish(self, body, **options)

    monkeypatch.setattr(Producer, "publish", note)
    run(world, second, seconds=60)

    (message,) = published
    assert message["body"][:2] == (["entry"], {"amount": 5})
    assert message["routing_key"] == "slow"
    assert message["priority"] == 3
    assert message["headers"]["tenant"] == "t"
    # Counted from the tick, not from the second attempt.
    assert message["headers"]["expires"].startswith("2026-11-30T04:00:0")


def test_a_tick_that_is_older_than_the_deadline_is_not_sent(world: World) -> None:
    die(world, start(world, {"schedule": crontab(minute=0)}), "before")
    run(world, start(world, {"schedule": crontab(minute=0)}, beat_cron_starting_deadline=20), seconds=60)
    assert sent(world) == []
    assert [row.error for row in ticks(world)] == ["not sent within beat_cron_starting_deadline"]


def test_a_message_that_cannot_be_sent_is_given_up(world: World, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (start(world, {"args": [{1, 2}.__iter__]}) for _ in range(2))
    run(world, first, second, seconds=80)
    assert sent(world) == []
    assert ["EncodeError" in (row.error or "") for row in ticks(world)] == [True]
    assert caplog.text.count("Message Error") == 1


# -- two beats ---------------------------------------------------------------------------------------------------------


def test_a_duplicate_is_counted_and_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="celery_idempotent")
    run(world, start(world, {}), start(world, {}), seconds=35)
    assert [row.duplicates for row in ticks(world)] == [1]
    assert len(sent(world)) == 1
    assert "is not sent: celery.beat[beat:shop:entry:2026-11-30T03:00] was taken by" in caplog.text


def test_a_monthly_tick_is_kept_until_the_next(world: World) -> None:
    """Else a beat that starts from an old file would send it again once it is purged, a week later."""
    run(world, start(world, {"schedule": crontab(minute=0, hour=3, day_of_month=30)}), seconds=35)
    (row,) = ticks(world)
    assert row.expires_at is not None
    assert row.expires_at - world.now > timedelta(days=30)


def test_an_id_of_the_entrys_own_is_kept(world: World) -> None:
    entry = {"task": "guarded", "options": {"message_id": "nightly"}}
    run(world, start(world, entry), start(world, entry), seconds=160)
    assert len(ticks(world)) == 3
    assert len(sent(world)) == 1  # each later one is a duplicate, which doctor warns of
    assert world.store.find(MessageKey("nightly", "guarded")) is not None


def test_arguments_are_made_once_for_a_message(world: World) -> None:
    made: list[int] = []

    def make() -> str:
        made.append(1)
        return "entry"

    run(world, start(world, {"args": [BeatLazyFunc(make)]}), seconds=35)
    assert [entry for _, entry, _ in world.published] == ["entry"]
    assert made == [1]


def test_a_shorter_interval_counts_at_once(world: World) -> None:
    run(world, start(world, {"schedule": 3600.0}), seconds=3605)
    assert len(sent(world)) == 1
    run(world, start(world, {"schedule": 10.0}), seconds=45)
    assert len(sent(world)) == 5


def test_a_slow_broker_does_not_halve_the_ticks(world: World) -> None:
    """Beat counts from before a publication: the next tick comes less than nine tenths of the interval after it."""
    world.after = lambda: world.advance(0.3)
    run(world, start(world, {"schedule": 2.0}), seconds=40)
    moments = world.sent("entry")
    gaps = [(later - earlier).total_seconds() for earlier, later in pairwise(moments)]
    assert len(moments) >= 16
    assert min(gaps) >= 1.8


def test_an_entry_that_is_gone_sends_no_more(world: World) -> None:
    beat = start(world, {"schedule": 10.0})
    run(world, beat, seconds=25)
    del beat.schedule["entry"]
    run(world, beat, seconds=25)
    assert len(sent(world)) == 2


def test_apps_of_other_names_have_ticks_of_their_own(world: World) -> None:
    other = world.app()
    other.main = "other"
    run(world, start(world, {}), start(world, {}, app=other), seconds=35)
    assert [row.key.message_id for row in ticks(world)] == [
        "beat:shop:entry:2026-11-30T03:00",
        "beat:other:entry:2026-11-30T03:00",
    ]
    assert len(sent(world)) == 2


@pytest.mark.parametrize("name", ["x" * 400, "nul\0", "lone\udc80", "ü" * 200])
def test_any_name_is_an_entrys(world: World, name: str) -> None:
    beats = [start(world, {}), start(world, {})]
    for beat in beats:
        beat.schedule[name] = beat.schedule.pop("entry")
        beat.schedule[name].name = name
    run(world, *beats, seconds=35)
    assert len(sent(world)) == len(ticks(world)) == 1


# -- without the guard -------------------------------------------------------------------------------------------------


def test_with_the_guard_off_beat_is_celerys(world: World) -> None:
    run(world, *(start(world, {}, idempotent_enabled=False) for _ in range(2)), seconds=35)
    assert len(sent(world)) == 2
    assert ticks(world) == []


def test_a_task_that_is_turned_off_is_sent_as_celery_would(world: World) -> None:
    beats = []
    for _ in range(2):
        app = world.app()
        app.task(base=IdempotentTask, name="off", shared=False, idempotent=False)(body)
        beats.append(start(world, {"task": "off"}, app=app))
    run(world, *beats, seconds=35)
    assert len(sent(world)) == 2
    assert ticks(world) == []


def body(_: str) -> None: ...


def test_a_scheduler_that_only_shows_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.idempotent_store = "nonsense://host/log"
    assert PersistentScheduler(app, lazy=True).info == "    . db -> None"
    assert "own_store" not in vars(app.__dict__.get("queue_log", object))


def test_a_wrong_setting_is_refused_at_the_start(world: World) -> None:
    app = world.app()
    app.conf.idempotent_lease = "long"
    app.conf.idempotent_retention = -1
    with pytest.raises(ConfigurationError, match="idempotent_retention"):
        start(world, {}, app=app)


def test_a_schedule_of_ones_own_names_its_ticks(world: World) -> None:
    class Own(IdempotentScheduler):
        def tick_of(self, entry: Any) -> Tick:
            return CalendarTick(entry.name, "today", None)

    beats: list[Scheduler] = []
    for _ in range(2):
        start(world, {})
        beats.append(Own(world._apps[-1], max_interval=60))
    run(world, *beats, seconds=200)
    assert [row.key.message_id for row in ticks(world)] == ["beat:shop:entry:today"]
    assert len(sent(world)) == 1


def test_the_schedule_of_another_library_is_a_calendar(world: World) -> None:
    class Quarter(BaseSchedule):  # type: ignore[misc]
        def remaining_estimate(self, last_run_at: Any) -> timedelta:
            after = last_run_at.replace(second=last_run_at.second // 15 * 15, microsecond=0) + timedelta(seconds=15)
            return timedelta(seconds=(after - self.now()).total_seconds())

        def is_due(self, last_run_at: Any) -> Any:
            left = self.remaining_estimate(last_run_at).total_seconds()
            return (True, 15.0) if left <= 0 else (False, left)

    run(world, *(start(world, {"schedule": Quarter()}) for _ in range(2)), seconds=44)
    assert [row.key.message_id.rpartition("T")[2] for row in ticks(world)] == [
        "02:59:45+00:00",
        "03:00:00+00:00",
    ]


def test_a_direct_call_moves_the_entry_on(world: World) -> None:
    """As RedBeat makes it, for one beat and for the other, which finds the tick taken."""
    for sends in (True, False):
        beat = start(world, {})
        entry = beat.schedule["entry"]
        assert (beat.apply_async(entry) is not None) is sends
        assert beat.schedule["entry"].total_run_count == entry.total_run_count + 1


def test_beat_wakes_up_to_look_for_ticks_that_were_left(world: World) -> None:
    beat = start(world, {"schedule": 3600.0})
    assert 0 < beat.tick() <= beat.look_every
