"""A healthy app, in which a test breaks one thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import Celery
from celery.bin.celery import celery
from redis import Redis

from celery_idempotent import IdempotentTask, QueueLog
from celery_idempotent.doctor import Finding, findings, read_facts
from tests.support.apps.spec import close_app
from tests.support.servers import PrivateRedis

__all__ = ["Examine", "MakeApp", "codes", "doctor_says"]

MakeApp = Callable[..., Celery]
Examine = Callable[..., list[Finding]]


class App(Celery):  # type: ignore[misc] # Celery has no types
    """An app that keeps its tasks to itself."""


@pytest.fixture
def good_redis(private_redis: PrivateRedis) -> PrivateRedis:
    """As the page on Redis wants it."""
    with Redis.from_url(private_redis.url) as client:
        client.config_set("appendfsync", "everysec")
    return private_redis


@pytest.fixture
def make_app(good_redis: PrivateRedis) -> Iterator[MakeApp]:
    """Yield an app with one guarded task, on a good Redis for messages, results and rows unless told otherwise."""
    apps: list[Celery] = []

    def make_app(*, task: dict[str, Any] | None = None, init: bool = True, **settings: Any) -> Celery:
        app = App("sick", set_as_current=False, broker=good_redis.url, backend=good_redis.url)
        app.conf.update(
            {
                "idempotent_store": good_redis.url,
                "task_acks_late": True,
                "task_reject_on_worker_lost": True,
                "result_expires": 7 * 86400,
                **settings,
            }
        )

        def charge(order_id: str) -> str:
            return order_id

        app.task(charge, base=IdempotentTask, name="shop.charge", shared=False, **(task or {}))
        app.finalize()
        apps.append(app)
        if init:
            QueueLog.of(app).init()
        return app

    yield make_app
    for app in apps:
        close_app(app)


def examine(app: Celery, *, ahead: float = 0.0, consumer_timeout: float | None = None) -> list[Finding]:
    """Return what is found with an app, on a host whose clock is so many seconds ahead."""

    def clock() -> datetime:
        return datetime.fromtimestamp(datetime.now(UTC).timestamp() + ahead, UTC)

    return findings(read_facts(QueueLog.of(app), consumer_timeout=consumer_timeout, clock=clock))


def codes(app: Celery, **options: Any) -> list[str]:
    """Return the codes of it."""
    return [finding.code for finding in examine(app, **options)]


def doctor_says(app: Celery, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, Any]:
    """Return the exit status of ``doctor --json``, and what it printed."""
    capsys.readouterr()
    celery.params[0].default = app
    try:
        status = celery.main(["idempotent", "doctor", "--json", *options], standalone_mode=False)
    finally:
        celery.params[0].default = None
    return status or 0, json.loads(capsys.readouterr().out)
