"""A real beat lives through an outage of its store, and of its broker: no tick is lost, and none is sent twice."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.integration.beat.test_two_beats import SCHEDULERS, Beat, Message, received
from tests.support.apps.beating import BeatSpec
from tests.support.deployment import unique
from tests.support.servers import PrivatePostgreSQL, PrivateRedis
from tests.support.waiting import wait_until


@pytest.mark.parametrize("away", ["store", "broker"])
def test_a_beat_lives_through_an_outage(
    private_postgresql: PrivatePostgreSQL, private_redis: PrivateRedis, tmp_path: Path, away: str
) -> None:
    spec = BeatSpec(
        scheduler=SCHEDULERS["persistent"],
        broker=private_redis.url,
        queue=unique("beat"),
        store=private_postgresql.url,
        sunset=time.time() - 600,
    )
    environment = Beat.environment_of(spec)
    prepare = [sys.executable, "-m", "tests.support.apps.beating", "1200", str(tmp_path / "beat")]
    subprocess.run(prepare, env=environment, check=True, timeout=60)
    beat = Beat(spec, tmp_path / "beat")
    server = private_postgresql if away == "store" else private_redis

    def wait_for(enough: Callable[[list[Message]], bool]) -> list[Message]:
        def found() -> list[Message] | None:
            messages = list(received(spec))
            return messages if enough(messages) else None

        return wait_until(found, timeout=60, describe=beat.text)

    try:
        before = len(wait_for(lambda messages: len(messages) >= 6))
        server.kill()
        asked = beat.text().count("beat")
        wait_until(lambda: beat.text().count("beat") > asked, timeout=60, describe=beat.text)
        time.sleep(3)  # some ticks are due meanwhile
        assert beat.process.poll() is None
        server.start()
        messages = wait_for(lambda messages: len(messages) >= before + 6)
        beat.stop()
    finally:
        beat.kill()

    ids = {message.task_id for message in messages}
    # A publication whose answer was lost is repeated by Celery itself, under the same id.
    assert len(messages) - len(ids) <= 1
    for task in ("plain", "guarded"):
        first: dict[str, float] = {}
        for message in sorted(messages, key=lambda message: message.published):
            if message.entry == f"interval.{task}":
                first.setdefault(message.task_id, message.published)
        assert min(later - earlier for earlier, later in pairwise(first.values())) >= 0.9 * 2 - 0.01
        assert len({message.task_id for message in messages if message.entry == f"solar.{task}"}) == 1
