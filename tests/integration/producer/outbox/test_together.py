"""What was committed together goes to Redis together: hundreds of messages in a few round trips, and none is lost when one fails."""

from __future__ import annotations

import time
from typing import Any

import pytest
import redis
from celery import Celery
from kombu import Producer

from celery_idempotent import outbox
from celery_idempotent.producer.publisher import ANSWER
from celery_idempotent.producer.relay import relay
from tests.support.apps import AppSpec, OpenApp
from tests.support.brokers import redis_broker
from tests.support.servers import PrivateRedis

pytestmark = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)

batched = pytest.mark.skipif(not hasattr(Producer, "batch"), reason="kombu publishes in batches since 5.7")

#: Not a multiple of what goes in one round trip.
MANY = 250


@pytest.fixture
def client(private_redis: PrivateRedis) -> redis.Redis:
    return redis.Redis.from_url(private_redis.url)


@pytest.fixture
def app(private_redis: PrivateRedis, store_url: str, open_app: OpenApp, tmp_path: object) -> Celery:
    queue = redis_broker(private_redis.url).queue
    spec = AppSpec(
        broker=private_redis.url, backend="cache+memory://", store=store_url, queue=queue, ledger=f"{tmp_path}/ledger"
    )
    return open_app(spec)


def send(app: Celery, name: str, count: int = MANY) -> list[str]:
    """Send a batch; the names of its messages, in its order."""
    names = [f"{name}-{number}" for number in range(count)]
    with outbox():
        for each in names:
            app.tasks["echo"].apply_async((each,), message_id=each)
    return names


def published(app: Celery) -> list[str]:
    """Return what the broker has got, in its order."""
    found = []
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue](connection.default_channel)
        while (message := queue.get(no_ack=True)) is not None:
            found.append(message.properties["message_id"])
    return found


@batched
def test_many_messages_are_few_round_trips(app: Celery, client: redis.Redis) -> None:
    send(app, "first")
    published(app)
    before = client.info("stats")["total_reads_processed"]
    names = send(app, "second")
    read = client.info("stats")["total_reads_processed"] - before
    assert read < MANY / 2, "Redis reads once for each that is waited for, and of many at once 16 KiB at a time"
    assert published(app) == names
    assert app.queue_log.store.unsent(limit=1) == []


def test_a_connection_that_broke_since_costs_nothing(app: Celery, client: redis.Redis) -> None:
    send(app, "first")
    published(app)
    client.client_kill_filter(_type="normal", skipme=True)
    names = send(app, "second")
    assert published(app) == names
    assert app.queue_log.store.unsent(limit=1) == [], "nothing was left to the relay"


@batched
def test_a_publication_in_doubt_is_repeated(app: Celery, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline: Any = redis.client.Pipeline
    execute = pipeline.execute
    failed: list[int] = []

    def fail_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        answers = execute(self, *args, **kwargs)
        if len(answers) == 100 and not failed:  # not what declares a queue
            failed.append(100)
            raise redis.ConnectionError("its answer was lost")
        return answers

    monkeypatch.setattr(pipeline, "execute", fail_once)
    names = send(app, "first", 120)
    assert failed == [100]
    found = published(app)
    assert found == names[:100] + names, "the first hundred twice, which their claims absorb"
    assert app.queue_log.store.unsent(limit=1) == []


def test_one_bad_message_is_left_to_the_relay(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = Producer.publish

    def refuse(self: Producer, body: Any, *args: Any, message_id: str = "", **kwargs: Any) -> Any:
        if message_id == "first-7":
            raise ValueError("not this one")
        return publish(self, body, *args, message_id=message_id, **kwargs)

    monkeypatch.setattr(Producer, "publish", refuse)
    names = send(app, "first", 20)
    assert published(app) == names[:7], "each once; those behind it keep their order"
    assert [row.key.message_id for row in app.queue_log.store.unsent(limit=99)] == names[7:]


def test_a_broker_that_says_nothing_is_waited_for_once(app: Celery, private_redis: PrivateRedis) -> None:
    send(app, "first", 3)
    published(app)
    private_redis.pause()
    began = time.monotonic()
    names = send(app, "second", 3)
    took = time.monotonic() - began
    private_redis.resume()
    assert took < 2 * ANSWER, "once for all of them"
    assert [row.key.message_id for row in app.queue_log.store.unsent(limit=9)] == names
    assert relay(app.queue_log).published == 3
    assert set(published(app)) == set(names)
