"""Two real beats on each scheduler, one of which is killed again and again: one message for each tick, of guarded tasks and of plain ones.

``BEAT_SECONDS`` is how long they run; ``make test-beat`` has them run for ten minutes.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from redis import Redis

from celery_idempotent.core.records import ProcessedStatus, RowFilter, Status
from celery_idempotent.stores import open_store
from tests.support.apps.beating import BeatSpec
from tests.support.deployment import unique
from tests.support.processes import kill_tree
from tests.support.servers import PrivateRedis
from tests.support.stores import postgresql_store
from tests.support.waiting import wait_until
from tests.support.worker import ROOT

SECONDS = float(os.environ.get("BEAT_SECONDS", "8"))

pytestmark = pytest.mark.timeout(SECONDS + 120)

#: Seconds between two kills, and at the end without any: a dead beat's lease, and a look.
KILL_EVERY, CALM = 15.0, 45.0

SCHEDULERS = {
    "persistent": "celery_idempotent.beat:PersistentScheduler",
    "django": "celery_idempotent.contrib.django.beat:DatabaseScheduler",
    "redbeat": "celery_idempotent.contrib.redbeat:RedBeatScheduler",
}


@dataclass(frozen=True)
class Message:
    """A message at the broker."""

    entry: str
    task_id: str
    published: float


class Beat:
    """A ``celery beat``, through its restarts."""

    def __init__(self, spec: BeatSpec, file: Path) -> None:
        self.file, self.log = file, file.with_suffix(".log")
        self.environment = self.environment_of(spec)
        self.start()

    @staticmethod
    def environment_of(spec: BeatSpec) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), **spec.environment()}

    def start(self) -> None:
        command = [sys.executable, "-m", "celery", "-A", "tests.support.apps.beating", "beat", "--loglevel=INFO"]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, f"--schedule={self.file}", "--pidfile="],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.file.parent,
                env=self.environment,
                start_new_session=True,
            )

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=30) == 0, self.text()

    def kill(self) -> None:
        kill_tree(self.process)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def asked(self) -> set[str]:
        """The entries that this beat found due."""
        return {
            entry
            for line in self.text().splitlines()
            if "Sending due task" in line
            for entry in [line.partition("Sending due task ")[2].split()[0]]
        }


@pytest.fixture(params=SCHEDULERS)
def spec(request: pytest.FixtureRequest, private_redis: PrivateRedis) -> Iterator[BeatSpec]:
    """Yield the app: each scheduler with a queue log where its users have it."""
    sunset = datetime.now(UTC) + timedelta(seconds=SECONDS / 2 if SECONDS > 60 else -600)
    spec = BeatSpec(
        scheduler=SCHEDULERS[request.param],
        broker=private_redis.url,
        queue=unique("beat"),
        store=private_redis.url,
        sunset=sunset.timestamp(),
    )
    if request.param == "redbeat":
        yield spec
        return
    with postgresql_store(request.getfixturevalue("postgresql_url")) as url:
        if request.param == "django":
            yield replace(spec, store="django://default", database=url)
        else:
            yield replace(spec, store=url)


def test_two_beats_send_one_message_for_each_tick(spec: BeatSpec, tmp_path: Path) -> None:
    files = [tmp_path / "first", tmp_path / "second"]
    subprocess.run(
        [sys.executable, "-m", "tests.support.apps.beating", "1200", *map(str, files)],
        env=Beat.environment_of(spec),
        check=True,
        timeout=60,
    )
    beats = [Beat(spec, file) for file in files]
    began, kills = time.time(), 0
    try:
        wait_until(lambda: all(beat.asked for beat in beats), timeout=60, describe=beats[0].text)
        running = time.time()
        while (left := running + SECONDS - time.time()) > 0:
            if kills == 0 or left > CALM:
                beats[kills % 2].kill()
                beats[kills % 2].start()
                kills += 1
            time.sleep(min(KILL_EVERY, left))
        # On a busy machine, a beat takes longer than that to send each entry once.
        wait_until(lambda: {message.entry for message in received(spec)} == set(spec.schedule()), timeout=60)
        for beat in beats:
            beat.stop()
    finally:
        for beat in beats:
            beat.kill()
    ended = time.time()

    messages = sorted(received(spec), key=lambda message: message.published)
    first: dict[str, Message] = {}
    for message in messages:
        first.setdefault(message.task_id, message)
    # Only a beat that dies between a publication and its end leaves a message to another one, which has the same id.
    assert len(messages) - len(first) <= kills
    assert {message.entry for message in messages} == set(spec.schedule())

    due = ticks(spec)
    sent = Counter(message.entry for message in first.values())
    for task in ("plain", "guarded"):
        moments = due[f"cron.{task}"]
        assert sent[f"cron.{task}"] == len(moments) == len(set(moments))
        # The latest one before they started, and each minute since.
        assert {later - earlier for earlier, later in pairwise(moments)} <= {timedelta(minutes=1)}
        assert datetime.fromtimestamp(began, UTC) - moments[0] < timedelta(seconds=90)
        assert moments[-1] >= datetime.fromtimestamp(ended - 65, UTC)
        assert sent[f"solar.{task}"] == 1
        published = [message.published for message in first.values() if message.entry == f"interval.{task}"]
        assert min(later - earlier for earlier, later in pairwise(published)) >= 0.9 * 2 - 0.01
        assert len(published) >= 0.6 * SECONDS / 2
    if "redbeat" not in spec.scheduler:  # whose beats share when an entry ran last
        # Each beat found each tick due, and one of them left it to the other.
        assert all(beat.asked == set(sent) for beat in beats)


def received(spec: BeatSpec) -> Iterator[Message]:
    """Yield what is in the queue."""
    with Redis.from_url(spec.broker) as client:
        for text in client.lrange(spec.queue, 0, -1):
            message = json.loads(text)
            (entry,), _, _ = json.loads(base64.b64decode(message["body"]))
            yield Message(entry, message["headers"]["id"], message["headers"]["published_at"])


def ticks(spec: BeatSpec) -> dict[str, list[datetime]]:
    """Return the due times of each entry with a calendar, oldest first; all of them are sent."""
    store = open_store(spec.database or spec.store, table=spec.table)
    try:
        rows = list(store.rows(RowFilter(task_name="celery.beat", limit=10_000)))
    finally:
        store.close()
    assert {(row.status, row.processed_status) for row in rows} == {(Status.DONE, ProcessedStatus.SUCCESS)}
    due: dict[str, list[datetime]] = {}
    for row in rows:
        _, _, entry, *at = row.key.message_id.split(":", 3)
        if at:
            due.setdefault(entry, []).append(datetime.fromisoformat(at[0]).replace(tzinfo=UTC))
    return {entry: sorted(moments) for entry, moments in due.items()}
