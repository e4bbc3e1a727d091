"""A broker that is down or silent delays a caller's commit only briefly, and loses nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from celery import Celery
from sqlalchemy.orm import Session

from celery_idempotent import outbox
from celery_idempotent.producer.publisher import Publisher
from celery_idempotent.producer.relay import relay
from tests.support.apps import AppSpec, OpenApp
from tests.support.brokers import redis_broker
from tests.support.effects import Effect, Effects
from tests.support.servers import PrivateServer
from tests.support.waiting import wait_until

#: Seconds. A silent broker is waited for five seconds, and once more on a new connection.
NOT_LONG = 25.0

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.parametrize("store_url", ["postgresql"], indirect=True),
]


@pytest.fixture
def effects(store_url: str) -> Iterator[Effects]:
    effects = Effects(store_url)
    yield effects
    effects.close()


@pytest.fixture(params=["redis", "rabbitmq"])
def server(request: pytest.FixtureRequest) -> PrivateServer:
    found: PrivateServer = request.getfixturevalue(f"private_{request.param}")
    return found


@pytest.fixture
def app(server: PrivateServer, store_url: str, open_app: OpenApp, tmp_path: object) -> Celery:
    queue = redis_broker(server.url).queue
    spec = AppSpec(
        broker=server.url,
        backend="cache+memory://",
        store=store_url,
        queue=queue,
        ledger=f"{tmp_path}/ledger",
        settings={"broker_connection_timeout": 2},
    )
    return open_app(spec)


def commit(app: Celery, effects: Effects, name: str) -> float:
    """Commit a transaction that sends a message; how many seconds that took."""
    began = time.monotonic()
    with Session(effects.engine) as session, outbox(session):
        session.add(Effect(name=name))
        app.tasks["echo"].apply_async((name,), message_id=name)
        session.commit()
    return time.monotonic() - began


def published(app: Celery) -> list[str]:
    """Return what the broker has."""
    found: list[str] = []
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue](connection.default_channel)
        queue.declare()
        while (message := queue.get(no_ack=True)) is not None:
            found.append(message.properties["message_id"])
    return found


def left(app: Celery) -> list[str]:
    return [row.key.message_id for row in app.queue_log.store.unsent(limit=100)]


def test_a_broker_that_is_down(app: Celery, effects: Effects, server: PrivateServer) -> None:
    commit(app, effects, "before")
    server.kill()

    assert commit(app, effects, "first") < NOT_LONG
    assert commit(app, effects, "second") < 1.0, "it is left in peace for a while"

    assert effects.names() == ["before", "first", "second"]
    assert left(app) == ["first", "second"]
    server.start()
    relayed = relay(app.queue_log)
    assert relayed.published == 2
    assert published(app)[-2:] == ["first", "second"]


def test_a_broker_that_says_nothing(app: Celery, effects: Effects, server: PrivateServer) -> None:
    commit(app, effects, "before")
    server.pause()
    try:
        assert commit(app, effects, "first") < NOT_LONG
        assert commit(app, effects, "second") < NOT_LONG
    finally:
        server.resume()
    assert effects.names() == ["before", "first", "second"]
    wait_until(
        lambda: not relay(app.queue_log, at_most=1e9).in_flight and not left(app),
        timeout=60.0,
        describe=lambda: f"the relay: {left(app)}",
    )
    names = published(app)
    # RabbitMQ may have got some before it fell silent, which are published once more then.
    assert {"first", "second"} <= set(names)


def test_a_relay_before_the_next_messages_does_not_wait_for_a_silent_broker(
    app: Celery, effects: Effects, server: PrivateServer
) -> None:
    commit(app, effects, "before")
    server.pause()
    try:
        assert commit(app, effects, "first") < NOT_LONG
        Publisher.of(app.queue_log)._not_before = 0.0  # the pause after a failure is over
        assert commit(app, effects, "second") < NOT_LONG
    finally:
        server.resume()
    assert effects.names() == ["before", "first", "second"]


def test_a_broken_broker_connection_is_replaced(app: Celery, effects: Effects, server: PrivateServer) -> None:
    commit(app, effects, "before")
    server.kill()
    server.start()
    commit(app, effects, "after")
    assert left(app) == []
    assert "after" in published(app)
