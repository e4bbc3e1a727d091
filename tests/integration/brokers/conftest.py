"""What the brokers' faults have in common: an app on a broker that the test may break, and a ledger that says who ran what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import redis
from celery.result import AsyncResult

from tests.support.apps import AppSpec, OpenApp
from tests.support.brokers import Broker
from tests.support.deployment import Deployment
from tests.support.ledger import Ledger
from tests.support.servers import PrivateRedis
from tests.support.stores import sqlite_store
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import WorkerProcess


@dataclass
class BrokerDeployment(Deployment):
    """An app on a broker that is about to fail it."""

    def assert_ran_once(self, task: str, values: Mapping[AsyncResult[Any], Any]) -> None:
        """Each has its value, by one run under one claim."""
        for result, value in values.items():
            assert result.get(timeout=TIMEOUT) == value
            row = self.wait_until_done(task, result)
            assert (row.processed_status, row.token) == ("success", 1)
        counted = {
            result.id: (len(self.starts(task, result)), len(self.ledger.ends(task_id=result.id))) for result in values
        }
        assert counted == {result.id: (1, 1) for result in values}


class Deploy(Protocol):
    """What the fixture ``make_site`` gives."""

    def __call__(
        self, broker: Broker, *, transport_options: Mapping[str, Any] | None = None, **settings: Any
    ) -> BrokerDeployment: ...


@pytest.fixture
def deploy(open_app: OpenApp, private_redis: PrivateRedis, ledger: Ledger, tmp_path: Path) -> Deploy:
    """Return an app on a broker, its rows in SQLite and its results on a Redis that stays.

    Tasks acknowledge late; a worker that can run two at once takes no third.
    """

    def deploy(
        broker: Broker, *, transport_options: Mapping[str, Any] | None = None, **settings: Any
    ) -> BrokerDeployment:
        spec = AppSpec(
            broker=broker.url,
            backend=private_redis.url,
            store=sqlite_store(tmp_path),
            queue=broker.queue,
            ledger=str(ledger.path),
            tasks=("tests.support.apps.generic", "tests.support.apps.lasting"),
            transport_options={**broker.transport_options, **(transport_options or {})},
            settings={
                **broker.settings,
                "task_acks_late": True,
                "worker_prefetch_multiplier": 1,
                # No lease must run out here.
                "idempotent_lease": 600,
                "idempotent_recovery_interval": 1,
                **settings,
            },
        )
        return BrokerDeployment(spec, open_app(spec))

    return deploy


def wait_until_redis_has_nothing_left(url: str, queue: str) -> None:
    """Wait until no message is in the queue or unacknowledged: what was counted by then stays as it is."""
    with redis.Redis.from_url(url) as client:
        wait_until(
            lambda: client.llen(queue) == client.hlen("unacked") == 0,
            describe=lambda: f"{client.lrange(queue, 0, -1)!r} and unacknowledged {client.hgetall('unacked')!r}",
        )


def times_logged(worker: WorkerProcess, text: str) -> int:
    """Count how often a worker's log has a text."""
    return worker.log.read_text(errors="replace").count(text)


def wait_until_logged(workers: list[WorkerProcess], text: str, count: int = 1) -> None:
    """Wait until the workers' logs together have a text so many times."""
    wait_until(
        lambda: sum(times_logged(worker, text) for worker in workers) >= count,
        describe=lambda: f"{count} times {text!r}:\n" + "\n".join(worker.log_tail() for worker in workers),
    )


Act = Callable[[], None]
