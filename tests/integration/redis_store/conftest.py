"""What the tests of the Redis store share: a Redis of the test's own, and a wire to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from celery_idempotent import RedisStore
from tests.integration.sql.wire import Wire
from tests.support.servers import PrivateRedis


@pytest.fixture
def store(private_redis: PrivateRedis) -> Iterator[RedisStore]:
    """Yield a store of the test's own, which has already been used."""
    store = RedisStore(private_redis.url)
    store.init()
    yield store
    store.close()


@pytest.fixture
def client(private_redis: PrivateRedis) -> Iterator[Redis]:
    """Yield the same server, as redis-py sees it."""
    with Redis.from_url(private_redis.url) as client:
        yield client


@pytest.fixture
def wire(private_redis: PrivateRedis) -> Iterator[Wire]:
    """Yield a wire to the server."""
    with Wire(private_redis.url) as wire:
        yield wire


@pytest.fixture
def wired(store: RedisStore, wire: Wire) -> Iterator[RedisStore]:
    """Yield a store at the other end of the wire, which has already been used, so that its connection is kept."""
    wired = RedisStore(wire.url)
    wired.check()
    yield wired
    wired.close()
