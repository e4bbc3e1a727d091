"""Messages that no store can keep: each is refused once, and what comes after it is served."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from redis import Redis

from celery_idempotent.core.records import MessageKey, RowFilter
from celery_idempotent.message.header import HEADER
from tests.support.apps import AppSpec, OpenApp
from tests.support.brokers import redis_broker
from tests.support.ledger import Ledger
from tests.support.servers import PrivateRedis
from tests.support.shared_workers import SharedWorker
from tests.support.stores import mariadb_store, postgresql_store, sqlite_store
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import StartWorker

#: What some database, or all of them, cannot keep as the text of an id.
TEXTS = {"nul": "a\0b", "long": "x" * 3000, "surrogate": "a\udcffb", "blank and long": " " * 300}
#: What is no text at all.
NO_TEXTS: dict[str, Any] = {"mapping": {"a": 1}, "list": ["a"], "number": 7, "flag": True}


@dataclass
class OpenBroker(SharedWorker):
    """A worker on a store, and a broker that takes anything."""

    _: KW_ONLY
    client: Redis

    def put_raw(
        self,
        headers: dict[str, Any] | None = None,
        *,
        task: str = "echo",
        args: Any = ("value",),
        embed: dict[str, Any] | None = None,
        routing_key: Any = None,
        **properties: Any,
    ) -> str:
        """Put a message on the broker's list as it is, and give its task id."""
        task_id = str(uuid4())
        body = json.dumps([list(args), {}, embed or {}]).encode()
        envelope = {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"id": task_id, "task": task, **(headers or {})},
            "properties": {
                "body_encoding": "base64",
                "delivery_info": {"exchange": "", "routing_key": routing_key or self.spec.queue},
                "delivery_tag": str(uuid4()),
                **properties,
            },
        }
        self.client.lpush(self.spec.queue, json.dumps(envelope))
        return task_id

    def ends(self, task_id: str) -> str:
        """Return the type of what a message ended with."""
        result = self.app.AsyncResult(task_id).get(timeout=TIMEOUT, propagate=False)
        return type(result).__name__

    def goes_on(self) -> None:
        """Check that the worker serves the next, and nothing is left that waits to come again."""
        assert self.app.AsyncResult(self.put_raw()).get(timeout=TIMEOUT) == "value"
        wait_until(
            lambda: not self.client.llen(self.spec.queue) and not self.client.hlen("unacked"),
            describe="an empty broker",
        )
        log = self.worker.log.read_text(errors="replace")
        assert "delivered again" not in log
        assert "Unrecoverable" not in log

    def recovers(self) -> None:
        """Wait for the end of a recovery pass that began after this: it purges what is old."""
        message_id = self.put_raw()
        assert self.app.AsyncResult(message_id).get(timeout=TIMEOUT) == "value"
        key = MessageKey(message_id, "echo")
        wait_until(
            lambda: self.app.queue_log.store.find(key) is None,
            describe=lambda: f"no row of {key}; {self.worker.log_tail()}",
        )
        assert "a recovery pass failed" not in self.worker.log.read_text(errors="replace")


@pytest.fixture(params=["sqlite", "postgresql", "mariadb", "redis"])
def deployment(
    request: pytest.FixtureRequest,
    private_redis: PrivateRedis,
    ledger: Ledger,
    open_app: OpenApp,
    start_worker: StartWorker,
    tmp_path: Path,
) -> Iterator[OpenBroker]:

    broker = redis_broker(private_redis.url)
    spec = AppSpec(
        broker=broker.url,
        backend=private_redis.url,
        store=private_redis.url,
        queue=broker.queue,
        ledger=str(ledger.path),
        tasks=("tests.support.apps.generic", "tests.support.apps.identified"),
        transport_options=broker.transport_options,
        settings={**broker.settings, "idempotent_recovery_interval": 0.5, "idempotent_retention": 2.0},
    )

    def deployment(store: str) -> Iterator[OpenBroker]:
        made = replace(spec, store=store)
        app = open_app(made)
        app.queue_log.init()
        with Redis.from_url(private_redis.url) as client:
            yield OpenBroker(made, app, start_worker(made, concurrency=2), client=client)

    match request.param:
        case "sqlite":
            yield from deployment(sqlite_store(tmp_path))
        case "postgresql":
            with postgresql_store(request.getfixturevalue("postgresql_url")) as url:
                yield from deployment(url)
        case "mariadb":
            with mariadb_store(request.getfixturevalue("mariadb_url")) as url:
                yield from deployment(url)
        case _:
            yield from deployment(private_redis.url)


def header(**marker: Any) -> dict[str, Any]:
    return {HEADER: marker}


def test_ids_are_refused_once(deployment: OpenBroker) -> None:
    given: dict[str, Any] = {**TEXTS, **NO_TEXTS}
    by_property = {name: deployment.put_raw(message_id=value) for name, value in given.items()}
    marked = header(message_id="good", task="echo", task_id="good")
    by_property |= {f"{name}, marked": deployment.put_raw(marked, message_id=value) for name, value in given.items()}
    for value in given.values():
        deployment.put_raw({"id": value})  # some of them have no caller who could be answered
        deployment.put_raw({"id": value}, message_id=str(uuid4()))
        deployment.put_raw({"id": value, **header(message_id=value, task="echo", task_id=value)})

    ended = {name: deployment.ends(task_id) for name, task_id in by_property.items()}

    assert ended == dict.fromkeys(by_property, "ConfigurationError")
    deployment.goes_on()
    deployment.recovers()


def test_a_header_that_is_no_marker_counts_for_nothing(deployment: OpenBroker) -> None:
    messages: dict[str, str] = {}
    for name, value in {**TEXTS, **NO_TEXTS}.items():
        for field in ("message_id", "task", "task_id", "fingerprint", "first", "trace", "holds", "lost", "copied"):
            marker = {"message_id": "m", "task": "echo", "task_id": "t", field: value}
            task_id = str(uuid4())
            if field not in ("message_id", "task_id"):
                marker.update(message_id=task_id, task_id=task_id)
            messages[f"{field}: {name}"] = deployment.put_raw({"id": task_id, **header(**marker)}) and task_id

    ended = {name: deployment.ends(task_id) for name, task_id in messages.items()}

    assert ended == dict.fromkeys(messages, "str")
    deployment.goes_on()
    deployment.recovers()


def test_numbers_are_refused_once(deployment: OpenBroker) -> None:
    messages = {
        repr(value): deployment.put_raw({"retries": value})
        for value in (2**70, 2**31, -1, 1.5, "3", "a\0", {"a": 1}, [1], True)
    }

    ended = {name: deployment.ends(task_id) for name, task_id in messages.items()}

    assert ended == dict.fromkeys(messages, "ConfigurationError")
    assert (
        deployment.ends(deployment.put_raw({"retries": 3}))
        == deployment.ends(deployment.put_raw({"retries": None}))
        == "str"
    )
    deployment.goes_on()
    deployment.recovers()


def test_routing_keys_are_refused_once(deployment: OpenBroker) -> None:
    messages = {name: deployment.put_raw(routing_key=value) for name, value in {**TEXTS, **NO_TEXTS}.items()}

    ended = {name: deployment.ends(task_id) for name, task_id in messages.items()}

    assert ended == dict.fromkeys(messages, "ConfigurationError")
    deployment.goes_on()
    deployment.recovers()


def test_a_message_that_never_ran_is_refused_too(deployment: OpenBroker) -> None:
    past = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    for value in {**TEXTS, **NO_TEXTS}.values():
        deployment.put_raw({"expires": past}, message_id=value)
        deployment.put_raw({"expires": past, "id": value})
    messages = [
        deployment.put_raw({"eta": "0001-01-01T00:00:01"}),
        deployment.put_raw({"expires": "9999-12-31T23:59:59"}),
        deployment.put_raw({"expires": "9999-12-31T23:59:59+00:00"}),
    ]

    assert [deployment.ends(task_id) for task_id in messages] == ["str"] * 3
    deployment.goes_on()
    deployment.recovers()


def test_an_errback_with_such_an_id_is_no_reason_to_come_again(deployment: OpenBroker) -> None:
    messages = {}
    for name, value in {**TEXTS, **NO_TEXTS}.items():
        errback = {"task": "echo", "args": [], "kwargs": {}, "options": {"task_id": value}, "immutable": True}
        task_id = str(uuid4())
        for _ in range(2):
            deployment.put_raw({"id": task_id}, task="fail", embed={"errbacks": [errback]})
        messages[name] = task_id

    ended = {name: deployment.ends(task_id) for name, task_id in messages.items()}

    assert ended == dict.fromkeys(messages, "ValueError")
    deployment.goes_on()
    deployment.recovers()


def test_the_store_keeps_what_other_alphabets_say(deployment: OpenBroker) -> None:
    message_id = "zażółć 🐇 中文"

    task_id = deployment.put_raw(message_id=message_id)

    assert deployment.ends(task_id) == "str"
    assert [row.key.message_id for row in deployment.app.queue_log.store.rows(RowFilter(message_id="zaż*"))] == [
        message_id
    ]
