"""What the brokers' faults have in common: an app on a broker that the test may break, and a ledger that says who ran what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import pytest
import redis
from celery import Celery
from celery.result import AsyncResult

from celery_idempotent.core.records import MessageKey, Row, Status
from tests.support.apps import AppSpec, OpenApp
from tests.support.brokers import Broker
from tests.support.ledger import Entry, Ledger
from tests.support.servers import PrivateRedis
from tests.support.stores import sqlite_store
from tests.support.waiting import wait_until
from tests.support.worker import WorkerProcess

#: Seconds for whatever happens soon on a machine that has nothing else to do.
TIMEOUT = 60.0


@dataclass(frozen=True)
class Deployment:
    """An app on a broker that is about to fail it.

    Attributes:
        spec: What its workers are built from.
        app: The app, on the test's side.
        ledger: Where its tasks note what they do.
        directory: For gates.
    """

    spec: AppSpec
    app: Celery
    ledger: Ledger
    directory: Path

    def send(self, task: str, *args: Any, **options: Any) -> AsyncResult[Any]:
        """Call a task."""
        result: AsyncResult[Any] = self.app.tasks[task].apply_async(args, **options)
        return result

    def gate(self) -> Path:
        """Return a file that is not there yet."""
        return self.directory / f"gate-{uuid4().hex[:8]}"

    def starts(self, result: AsyncResult[Any]) -> list[Entry]:
        """Each time that its body was entered."""
        return self.ledger.starts(task_id=result.id)

    def wait_for_starts(self, result: AsyncResult[Any], count: int = 1) -> list[Entry]:
        """Wait for so many, and return them."""
        return wait_until(
            lambda: starts if len(starts := self.starts(result)) >= count else None,
            timeout=TIMEOUT,
            describe=lambda: f"{count} start(s) of {result.id}: {self.ledger.entries()}",
        )

    def row(self, result: AsyncResult[Any], task: str) -> Row:
        """Its row."""
        row: Row | None = self.app.queue_log.store.find(MessageKey(result.id, task))
        assert row is not None
        return row

    def settled(self, result: AsyncResult[Any], task: str, *, duplicates: int = 0) -> Row:
        """Its row, once it is done and so many copies were skipped."""

        def settled() -> Row | None:
            row = self.row(result, task)
            return row if row.status is Status.DONE and row.duplicates >= duplicates else None

        return wait_until(settled, timeout=TIMEOUT, describe=lambda: self.row(result, task))

    def assert_ran_once(self, task: str, values: Mapping[AsyncResult[Any], Any]) -> None:
        """Each has its value, by one run under one claim."""
        for result, value in values.items():
            assert result.get(timeout=TIMEOUT) == value
            row = self.settled(result, task)
            assert (row.processed_status, row.token) == ("success", 1)
        counted = {result.id: (len(self.starts(result)), len(self.ledger.ends(task_id=result.id))) for result in values}
        assert counted == {result.id: (1, 1) for result in values}


class Deploy(Protocol):
    """What the fixture ``make_site`` gives."""

    def __call__(
        self, broker: Broker, *, transport_options: Mapping[str, Any] | None = None, **settings: Any
    ) -> Deployment: ...


@pytest.fixture
def deploy(open_app: OpenApp, private_redis: PrivateRedis, ledger: Ledger, tmp_path: Path) -> Deploy:
    """Return an app on a broker, its rows in SQLite and its results on a Redis that stays.

    Tasks acknowledge late; a worker that can run two at once takes no third.
    """

    def deploy(broker: Broker, *, transport_options: Mapping[str, Any] | None = None, **settings: Any) -> Deployment:
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
                # Where a lease must not run out, nobody is to wait for it either.
                "idempotent_lease": 600,
                "idempotent_recovery_interval": 1,
                **settings,
            },
        )
        return Deployment(spec, open_app(spec), ledger, tmp_path)

    return deploy


def wait_until_redis_has_nothing_left(url: str, queue: str) -> None:
    """Wait until no message is in the queue or unacknowledged: what was counted by then stays as it is."""
    with redis.Redis.from_url(url) as client:
        wait_until(
            lambda: client.llen(queue) == client.hlen("unacked") == 0,
            timeout=TIMEOUT,
            describe=lambda: f"{client.lrange(queue, 0, -1)!r} and unacknowledged {client.hgetall('unacked')!r}",
        )


def times_logged(worker: WorkerProcess, text: str) -> int:
    """How often a worker has said something."""
    return worker.log.read_text(errors="replace").count(text)


def wait_until_logged(workers: list[WorkerProcess], text: str, count: int = 1) -> None:
    """Wait until workers together have said something so often."""
    wait_until(
        lambda: sum(times_logged(worker, text) for worker in workers) >= count,
        timeout=TIMEOUT,
        describe=lambda: f"{count} times {text!r}:\n" + "\n".join(worker.log_tail() for worker in workers),
    )


Act = Callable[[], None]
