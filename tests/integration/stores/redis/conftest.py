"""What the tests of the Redis store share: a Redis of the test's own, and a wire tap to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from celery_idempotent import RedisStore
from tests.support.servers import PrivateRedis
from tests.support.wire_tap import WireTap


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
def wire_tap(private_redis: PrivateRedis) -> Iterator[WireTap]:
    """Yield a wire tap to the server."""
    with WireTap(private_redis.url) as wire_tap:
        yield wire_tap


@pytest.fixture
def tapped_store(store: RedisStore, wire_tap: WireTap) -> Iterator[RedisStore]:
    """Yield a store at the other end of the wire tap, which has already been used, so that its connection is kept."""
    tapped_store = RedisStore(wire_tap.url)
    tapped_store.check()
    yield tapped_store
    tapped_store.close()
