"""A batch that Redis refuses in the middle: the first of its scripts have taken effect."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
from celery import Celery
from redis import Redis

from celery_idempotent import IdempotentTask, QueueLog, RedisStore, StoreUnavailableError, outbox
from celery_idempotent.core.records import RowFilter
from celery_idempotent.producer.relay import relay
from tests.support.apps import close_app


@pytest.fixture
def app(store: RedisStore) -> Iterator[Celery]:
    app = Celery("outbox", set_as_current=False, broker="memory://", backend="cache+memory://")
    app.conf.update(task_default_queue=f"outbox-{uuid4().hex[:8]}", task_publish_retry=False)
    QueueLog(app, store=store)
    yield app
    close_app(app)


def test_of_a_batch_that_does_not_fit_nothing_is_left(app: Celery, store: RedisStore, client: Redis) -> None:
    @app.task(base=IdempotentTask, name="charge", message_id="{order}", shared=False)
    def charge(order: str, load: str) -> str:
        return order

    def memory() -> int:
        return int(client.info("memory")["used_memory"])

    before, load = memory(), "x" * 50_000
    with outbox():
        for number in range(100):
            charge.delay(f"warm-{number}", load)
    each = (memory() - before) // 100

    client.config_set("maxmemory", memory() + 150 * each)
    with pytest.raises(StoreUnavailableError, match=r"none of the 400 calls .* was sent$"), outbox():  # noqa: PT012
        for number in range(400):
            charge.delay(f"o-{number}", load)
    client.config_set("maxmemory", 0)

    assert len(list(store.rows(RowFilter(limit=1000)))) == 100
    assert relay(app.queue_log).published == 0
    assert not store.unsent(limit=9)
