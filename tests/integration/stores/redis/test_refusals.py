"""A server that cannot do it for now says so in words that depend on its version; here it means one thing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from redis import Redis

from celery_idempotent import RedisStore
from celery_idempotent.core.records import Inserted, MessageKey
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.testing.examples import claim, new_message, pending, read
from tests.support.servers import PrivateRedis, skip_if_not_installed
from tests.support.servers.redis import redis_6


@contextmanager
def opened(version: str, replica_of: PrivateRedis | None = None) -> Iterator[PrivateRedis]:
    with skip_if_not_installed(f"a Redis {version}"):
        program = redis_6() if version == "6.2" else None
        with PrivateRedis(program=program, replica_of=replica_of) as server:
            yield server


@pytest.fixture(params=["6.2", "installed"])
def server(request: pytest.FixtureRequest) -> Iterator[PrivateRedis]:
    with opened(request.param) as server:
        yield server


@pytest.fixture
def client(server: PrivateRedis) -> Iterator[Redis]:
    with Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
def store(server: PrivateRedis) -> Iterator[RedisStore]:
    store = RedisStore(server.url)
    store.init()
    yield store
    store.close()


def test_too_few_replicas_are_unavailable(store: RedisStore, client: Redis) -> None:
    """The replicas go during a run: its writes wait until there are enough again."""
    pending(store)
    held = claim(store)
    client.config_set("min-replicas-to-write", 1)

    for ask in (
        lambda: store.record(new_message(MessageKey("new", "t"))),
        lambda: store.complete(held, result=b"1"),
        lambda: store.renew([held], lease=60.0),
    ):
        with pytest.raises(StoreUnavailableError, match="NOREPLICAS") as caught:
            ask()
        assert caught.value.unsent

    client.config_set("min-replicas-to-write", 0)
    assert store.complete(held, result=b"1")
    assert read(store).result == b"1"


def test_a_full_memory_is_unavailable(store: RedisStore, client: Redis) -> None:
    pending(store)
    client.config_set("maxmemory", 1)

    with pytest.raises(StoreUnavailableError, match="used memory > 'maxmemory'") as caught:
        store.record(new_message(MessageKey("new", "t")))

    assert caught.value.unsent
    assert store.find(MessageKey("new", "t")) is None
    assert store.complete(claim(store), result=b"1"), "what it has goes on"
    client.config_set("maxmemory", 0)
    assert store.record(new_message(MessageKey("new", "t"))) == Inserted()


@pytest.mark.parametrize("version", ["6.2", "installed"])
def test_a_replica_is_unavailable(version: str) -> None:
    with (
        opened(version) as master,
        opened(version, replica_of=master) as replica,
        closing(RedisStore(replica.url)) as store,
    ):
        with pytest.raises(StoreUnavailableError, match="is on a replica") as caught:
            store.record(new_message())
        assert caught.value.unsent
