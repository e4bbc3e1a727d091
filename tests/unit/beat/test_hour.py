"""Two beats for an hour of simulated time, with restarts, kills and a clock that is set back: one message for each tick."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from celery import beat
from celery.beat import Scheduler
from celery.schedules import crontab, solar

from celery_idempotent.beat import PersistentScheduler
from celery_idempotent.core.records import ProcessedStatus, RowFilter, Status
from tests.unit.beat.conftest import Killed, World

#: Sets on this day at 03:28:06 UTC, here.
SUNSET = ("sunset", 0.0, -144.0)


def schedule() -> dict[str, Any]:
    return {
        "minutely": {"task": "plain", "schedule": crontab(), "args": ["minutely"]},
        "five": {"task": "guarded", "schedule": crontab(minute="*/5"), "args": ["five"]},
        "nightly": {"task": "plain", "schedule": crontab(minute=0, hour=3), "args": ["nightly"]},
        "seven": {"task": "plain", "schedule": 7.0, "args": ["seven"]},
        "minute": {"task": "guarded", "schedule": timedelta(minutes=1), "args": ["minute"]},
        "sunset": {"task": "plain", "schedule": solar(*SUNSET), "args": ["sunset"]},
        "sunset.guarded": {"task": "guarded", "schedule": solar(*SUNSET), "args": ["sunset.guarded"]},
    }


class Beat:
    """A beat, through its restarts; its file is what the disk had of it."""

    def __init__(self, world: World, name: str, kind: type[Scheduler]) -> None:
        self.world, self.name, self.kind = world, name, kind
        self.life, self.ahead = 0, 0.0
        self.wake = world.now
        self.start()

    def start(self) -> None:
        app = self.world.app(ahead=self.ahead, beat_schedule=schedule(), beat_sync_every=5, beat_max_loop_interval=60)
        self.scheduler = self.kind(app, schedule_filename=str(self.file))
        self.wake = self.world.now

    @property
    def file(self) -> Path:
        return self.world.directory / f"{self.name}-{self.life}"

    def run(self) -> None:
        """Do what is due, and say when to wake up."""
        # An entry that comes from the file has lost its app, and asks the current one for the time.
        self.scheduler.app.set_current()
        try:
            while not (wait := self.scheduler.tick()):
                self.world.advance(0.001)  # nothing takes no time
        except Killed:
            self.kill()
        else:
            self.wake = self.world.now + timedelta(seconds=wait)

    def kill(self) -> None:
        """Start again, from what is on the disk."""
        left, self.life = self.file, self.life + 1
        for path in left.parent.glob(f"{left.name}*"):
            shutil.copy(path, path.with_name(path.name.replace(left.name, self.file.name)))
        self.start()

    def restart(self) -> None:
        self.scheduler.close()
        self.kill()

    def set_clock(self, ahead: float) -> None:
        self.ahead = ahead
        self.restart()


def simulate(world: World, kind: type[Scheduler], seed: int) -> Counter[str]:
    dice, kills = random.Random(seed), Counter[str]()
    beats = [Beat(world, "first", kind), Beat(world, "second", kind)]
    beats[1].set_clock(0.7)
    end = world.now + timedelta(hours=1)

    def kill_at_next(when: str) -> None:
        kills[when] += 1
        world.kill_at_next(when)

    trouble: list[Callable[[Beat], object]] = [
        Beat.kill,
        Beat.restart,
        lambda _: kill_at_next("before"),
        lambda _: kill_at_next("after"),
        lambda _: beats[1].set_clock(dice.choice([-90.0, -0.4, 0.7])),
    ]
    next_trouble = world.now
    while world.now < end:
        beat = min(beats, key=lambda beat: beat.wake)
        world.now = max(world.now, beat.wake)
        if world.now >= next_trouble and end - world.now > timedelta(minutes=2):
            next_trouble = world.now + timedelta(seconds=dice.uniform(20, 150))
            dice.choice(trouble)(beat)
        beat.run()
        world.advance(0.001)
    return kills


def rows(world: World) -> list[Any]:
    return list(world.store.rows(RowFilter(task_name="celery.beat", limit=10_000)))


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_an_hour_with_restarts_has_one_message_for_each_tick(world: World, seed: int) -> None:
    kills = simulate(world, PersistentScheduler, seed)

    # Every message was sent under one Celery id; one was sent again only if its beat died after it had published it.
    times = Counter(task_id for _, _, task_id in world.published)
    assert sum(times.values()) - len(times) <= kills["after"]
    assert kills["after"]
    assert kills["before"]
    counts = {entry: len(world.sent(entry)) for entry in ("minutely", "five", "nightly", "sunset", "sunset.guarded")}
    assert counts == {"minutely": 60, "five": 12, "nightly": 1, "sunset": 1, "sunset.guarded": 1}
    for entry, interval in (("seven", 7.0), ("minute", 60.0)):
        gaps = [(later - earlier).total_seconds() for earlier, later in pairwise(world.sent(entry))]
        assert min(gaps) >= 0.9 * interval
        # Two beats that count from different moments, and the leases of up to three that died in a row.
        assert max(gaps) <= 2 * interval + 3 * 40
    assert {(row.status, row.processed_status) for row in rows(world)} == {(Status.DONE, ProcessedStatus.SUCCESS)}


def test_celerys_own_scheduler_sends_a_tick_once_for_each_beat(world: World) -> None:
    """What the hour would be without the queue log: the test can fail."""
    simulate(world, beat.PersistentScheduler, seed=1)
    assert len(world.sent("nightly")) > 1
    assert len(world.sent("minutely")) > 100
