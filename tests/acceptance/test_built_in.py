"""Celery's own ``worker_deduplicate_successful_tasks`` beside the queue log, on Redis with late acknowledgement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartWorker
from tests.support.apps import OpenApp
from tests.support.stand import Stand, unique

pytestmark = pytest.mark.parametrize("stands", ["redis"], indirect=True)


@pytest.fixture
def built_in(plain: Stand, open_app: OpenApp, start_worker: StartWorker, tmp_path: Path) -> Stand:
    spec = replace(
        plain.spec,
        queue=f"{plain.queue}-built-in",
        ledger=str(tmp_path / "ledger.jsonl"),
        settings={**plain.spec.settings, "worker_deduplicate_successful_tasks": True},
    )
    return Stand.of(spec, open_app(spec), start_worker(spec))


def put_as_redelivered(stand: Stand, task: str, *args: Any) -> str:
    """Put a message on the queue twice, once as it was sent, and once it has run, as Redis does when it restores one.

    Returns:
        The Celery id.
    """
    result = stand.task(task).apply_async(args, queue=stand.aside)
    with stand.app.connection_for_write() as connection:
        redis = connection.default_channel.client
        raw = redis.rpop(stand.aside)
        message = json.loads(raw)
        message["properties"]["delivery_info"]["redelivered"] = True
        message["headers"]["redelivered"] = True
        redis.lpush(stand.queue, raw)
        stand.wait_until_idle()
        redis.lpush(stand.queue, json.dumps(message))
        stand.wait_until_idle()
    return str(result.id)


def test_built_in_deduplication_with_ignore_result(guarded: Stand, built_in: Stand) -> None:
    kept, quiet, sent_twice = unique("kept"), unique("quiet"), unique("twice")

    for stand in (guarded, built_in):
        put_as_redelivered(stand, "once", kept)
        put_as_redelivered(stand, "quiet", quiet)
        _, message = stand.copies(
            lambda queue, stand=stand: stand.task("once").apply_async((sent_twice,), queue=queue)  # type: ignore[misc]
        )
        stand.put(message)
        stand.wait_until_idle()
        stand.put(message)
        stand.wait_until_idle()

    def runs(stand: Stand) -> list[int]:
        return [len(stand.starts(key)) for key in (kept, quiet, sent_twice)]

    # The built-in needs a result to look at, and a broker that says "redelivered".
    assert runs(built_in) == [1, 2, 2]
    assert runs(guarded) == [1, 1, 1]
