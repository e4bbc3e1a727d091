"""The contract of a store, met by the Redis store on a server of its own and on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from uuid import uuid4

import pytest
from redis import Redis

from celery_idempotent.core.store import Store
from celery_idempotent.stores import open_store
from celery_idempotent.testing import StoreContract
from tests.support.servers import PrivateRedis, skip_if_not_installed
from tests.support.servers.redis import redis_6
from tests.support.servers.redis_cluster import PrivateRedisCluster


class TestRedis(StoreContract):
    @pytest.fixture
    def open_store_again(self, redis_url: str) -> Iterator[Callable[[], Store]]:
        table = f"contract_{uuid4().hex[:12]}"
        yield partial(open_store, redis_url, table=table)
        with Redis.from_url(redis_url) as client:
            for key in client.scan_iter(match=f"{{{table}:*", count=1000):
                client.delete(key)


@pytest.fixture(scope="module")
def redis_6_2() -> Iterator[PrivateRedis]:
    with skip_if_not_installed("a Redis 6.2"), PrivateRedis(program=redis_6()) as server:
        yield server


class TestRedis6(StoreContract):
    @pytest.fixture
    def open_store_again(self, redis_6_2: PrivateRedis) -> Callable[[], Store]:
        return partial(open_store, redis_6_2.url, table=f"contract_{uuid4().hex[:12]}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateRedisCluster]:
    with skip_if_not_installed(), PrivateRedisCluster() as cluster:
        yield cluster


class TestRedisCluster(StoreContract):
    @pytest.fixture
    def open_store_again(self, cluster: PrivateRedisCluster) -> Callable[[], Store]:
        return partial(open_store, cluster.url, table=f"contract_{uuid4().hex[:12]}")
