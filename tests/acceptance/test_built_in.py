"""Celery's ``worker_deduplicate_successful_tasks`` compared with the queue log, on Redis with late acknowledgement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartWorker
from tests.support.apps import OpenApp
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker

pytestmark = pytest.mark.parametrize("both_workers", ["redis"], indirect=True)


@pytest.fixture
def built_in(plain: SharedWorker, open_app: OpenApp, start_worker: StartWorker, tmp_path: Path) -> SharedWorker:
    spec = replace(
        plain.spec,
        queue=f"{plain.spec.queue}-built-in",
        ledger=str(tmp_path / "ledger.jsonl"),
        settings={**plain.spec.settings, "worker_deduplicate_successful_tasks": True},
    )
    return SharedWorker(spec, open_app(spec), start_worker(spec))


def put_as_redelivered(shared_worker: SharedWorker, task: str, *args: Any) -> str:
    """Put a message on the queue twice, once as it was sent, and once it has run, as Redis does when it restores one.

    Returns:
        The Celery id.
    """
    result = shared_worker.task(task).apply_async(args, queue=shared_worker.spare_queue)
    with shared_worker.app.connection_for_write() as connection:
        redis = connection.default_channel.client
        raw = redis.rpop(shared_worker.spare_queue)
        message = json.loads(raw)
        message["properties"]["delivery_info"]["redelivered"] = True
        message["headers"]["redelivered"] = True
        redis.lpush(shared_worker.spec.queue, raw)
        shared_worker.wait_until_idle()
        redis.lpush(shared_worker.spec.queue, json.dumps(message))
        shared_worker.wait_until_idle()
    return str(result.id)


def test_built_in_deduplication_with_ignore_result(guarded: SharedWorker, built_in: SharedWorker) -> None:
    kept, quiet, sent_twice = unique("kept"), unique("quiet"), unique("twice")

    for shared_worker in (guarded, built_in):
        put_as_redelivered(shared_worker, "once", kept)
        put_as_redelivered(shared_worker, "quiet", quiet)
        _, message = shared_worker.copies(
            lambda queue, shared_worker=shared_worker: shared_worker.task("once").apply_async(
                (sent_twice,), queue=queue
            )  # type: ignore[misc]
        )
        shared_worker.put(message)
        shared_worker.wait_until_idle()
        shared_worker.put(message)
        shared_worker.wait_until_idle()

    def runs(shared_worker: SharedWorker) -> list[int]:
        return [len(shared_worker.starts_under(key)) for key in (kept, quiet, sent_twice)]

    # The built-in needs a result to look at, and a broker that says "redelivered".
    assert runs(built_in) == [1, 2, 2]
    assert runs(guarded) == [1, 1, 1]
