"""What the outage tests share: their own PostgreSQL, Redis and worker, and short waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery

from tests.conftest import StartWorker
from tests.support.apps import AppSpec, OpenApp, close_app
from tests.support.apps.short_waits import shorten_waits
from tests.support.brokers import redis_broker
from tests.support.ledger import Ledger
from tests.support.servers import PrivatePostgreSQL, PrivateRedis, skip_if_not_installed
from tests.support.worker import WorkerProcess

#: A producer's patience: half a second or so, or a server that comes back within twenty.
SHORT = {"max_retries": 2, "interval_start": 0.1, "interval_step": 0.1, "interval_max": 0.2}
LONG = {"max_retries": 200, "interval_start": 0.1, "interval_step": 0.0, "interval_max": 0.1}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; workers have it from their app's module."""
    shorten_waits(monkeypatch.setattr)


@pytest.fixture(scope="session")
def outage_server() -> Iterator[PrivatePostgreSQL]:
    """Yield a PostgreSQL of this test process: making one takes longer than most of these tests."""
    with skip_if_not_installed(), PrivatePostgreSQL() as server:
        yield server


@pytest.fixture
def postgresql(outage_server: PrivatePostgreSQL) -> Iterator[PrivatePostgreSQL]:
    """Yield the same, for a test to stop, kill and freeze."""
    yield outage_server
    if outage_server._process is None:
        outage_server.start()
    else:
        outage_server.resume()


@pytest.fixture
def spec(postgresql: PrivatePostgreSQL, private_redis: PrivateRedis, ledger: Ledger) -> AppSpec:
    """Return an app whose store the test can take away; results and messages stay."""
    broker = redis_broker(private_redis.url)
    return AppSpec(
        broker=broker.url,
        backend=broker.url,
        store=postgresql.url,
        table=f"queue_log_{uuid4().hex[:12]}",
        queue=broker.queue,
        ledger=str(ledger.path),
        tasks=("tests.support.apps.generic", "tests.support.apps.outages"),
        transport_options=broker.transport_options,
        # Recovery would make up for what is lost here.
        settings={"task_publish_retry_policy": SHORT, "idempotent_recovery_interval": 0},
    )


@pytest.fixture
def open_app() -> Iterator[OpenApp]:
    """Build an app in this process and make its queue log's table; close all its connections in the end."""
    apps: list[Celery] = []

    def open_app(spec: AppSpec) -> Celery:
        app = spec.build()
        apps.append(app)
        app.finalize()
        app.queue_log.init()
        return app

    yield open_app
    for app in apps:
        # An unread result would ask for its Redis when it is collected, long after that is gone.
        app.backend.result_consumer.stop()
        app.backend.result_consumer._pubsub = None
        close_app(app)


@pytest.fixture
def app(spec: AppSpec, open_app: OpenApp) -> Celery:
    return open_app(spec)


@pytest.fixture
def start_worker_with_short_waits(spec: AppSpec, start_worker: StartWorker) -> Callable[..., WorkerProcess]:
    """Start a worker of the test's app, with other settings if need be."""

    def start(*, settings: dict[str, Any] | None = None, **options: Any) -> WorkerProcess:
        changed = replace(spec, settings={**spec.settings, **(settings or {})})
        return start_worker(changed, app="tests.support.apps.short_waits", **options)

    return start
