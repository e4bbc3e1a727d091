"""What is left after a server evicted rows or was emptied: no row is hidden, and none is answered wrongly."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from redis import Redis

from celery_idempotent import RedisStore
from celery_idempotent.core.records import Claimed, MessageKey, Row
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.stores.redis.layout import Layout, identity
from celery_idempotent.testing.examples import (
    claim,
    done,
    new_message,
    pending,
    processing,
    read,
    take,
    try_claim,
    wait_until,
)
from tests.support.servers import PrivateRedis

LAYOUT = Layout("queue_log")


def evict(client: Redis, key: MessageKey, *parts: str) -> None:
    ident = identity(key)
    for part in parts:
        assert client.delete(LAYOUT.tag(ident) + f":{part}:".encode() + ident)


def numbered(number: int) -> MessageKey:
    return MessageKey(f"m{number}", "shop.charge")


def many_in_one_shard(count: int) -> list[MessageKey]:
    found: list[MessageKey] = []
    number = 0
    while len(found) < count:
        number += 1
        if LAYOUT.shard(identity(numbered(number))) == 0:
            found.append(numbered(number))
    return found


def keys(rows: list[Row]) -> list[MessageKey]:
    return [row.key for row in rows]


def test_rows_that_were_evicted_do_not_hide_a_lapsed_one(store: RedisStore, client: Redis) -> None:
    *gone, last = many_in_one_shard(8)
    for key in (*gone, last):
        store.record(new_message(key))
        claim(store, new_message(key), lease=0.001)
    for key in gone:
        evict(client, key, "row")
    wait_until(lambda: read(store, last).lease_left < 0)

    assert keys(store.lapsed(again_after=0.0, limit=2)) == [last]
    assert client.zcard(LAYOUT.tags[0] + b":running") == 1, "they were taken out"
    for key in gone:
        assert not client.exists(LAYOUT.tag(identity(key)) + b":big:" + identity(key))


def test_nor_one_that_waits(store: RedisStore, client: Redis) -> None:
    *gone, last = many_in_one_shard(8)
    for key in (*gone, last):
        store.record(new_message(key))
    for key in gone:
        evict(client, key, "row")

    assert keys(store.waiting(older_than=0.0, limit=2)) == [last]
    assert keys(store.waiting(older_than=0.0, limit=2, before={"celery": datetime(2100, 1, 1, tzinfo=UTC)})) == [last]
    assert client.zcard(LAYOUT.tags[0] + b":waiting:celery") == 1


def test_a_queue_of_which_all_was_evicted_is_forgotten(store: RedisStore, client: Redis) -> None:
    (key,) = many_in_one_shard(1)
    store.record(new_message(key))
    assert client.smembers(LAYOUT.tags[0] + b":queues") == {b":waiting:celery"}
    evict(client, key, "row")

    assert store.waiting(older_than=0.0, limit=2) == []
    assert client.smembers(LAYOUT.tags[0] + b":queues") == set()


def test_nor_one_that_was_not_sent(store: RedisStore, client: Redis) -> None:
    *gone, last = many_in_one_shard(8)
    for key in (*gone, last):
        store.record(new_message(key, published=False))
    for key in gone:
        evict(client, key, "row")

    assert keys(store.unsent(limit=2)) == [last]
    assert client.zcard(LAYOUT.tags[0] + b":unsent") == 1


def test_evicted_rows_raise_no_alarm(store: RedisStore, client: Redis) -> None:
    lapsed, unsent = numbered(1), numbered(2)
    store.record(new_message(lapsed))
    claim(store, new_message(lapsed), lease=0.001)
    store.record(new_message(unsent, published=False))
    wait_until(lambda: read(store, lapsed).lease_left < 0)
    for key in (lapsed, unsent):
        evict(client, key, "row")

    health = store.health()

    assert (health.lapsed_since, health.unsent_since) == (None, None)


def test_a_log_without_evictions_is_read_as_before(store: RedisStore) -> None:
    all_keys = many_in_one_shard(5)
    for key in all_keys:
        store.record(new_message(key))
        claim(store, new_message(key), lease=0.001)
    wait_until(lambda: read(store, all_keys[-1]).lease_left < 0)

    assert keys(store.lapsed(again_after=0.0, limit=3)) == all_keys[:3]
    assert take(store, read(store, all_keys[0])) is not None
    assert keys(store.lapsed(again_after=0.0, limit=9)) == all_keys[1:]


@pytest.mark.parametrize("how", ["recorded", "claimed"])
def test_a_message_is_not_answered_with_what_an_evicted_row_has_left(
    store: RedisStore, client: Redis, how: str
) -> None:
    held = done(store)
    assert read(store).result == b'"receipt"'
    evict(client, held.key, "row")

    if how == "recorded":
        row = pending(store, message=None)
        assert (row.message, row.result) == (None, None)
    else:
        assert isinstance(try_claim(store, new_message(message=None)), Claimed)
        assert (read(store).message, read(store).result) == (None, None)


def test_a_server_that_was_emptied_says_its_layout_again(store: RedisStore, client: Redis) -> None:
    processing(store)
    layout = LAYOUT.tags[0] + b":layout"
    assert client.get(layout) == b"1"
    client.flushall()
    processing(store)

    store.purge(older_than=3600.0, limit=10)

    assert client.get(layout) == b"1"


# -- connections -------------------------------------------------------------------------------------------------------


def test_a_process_has_no_more_connections_than_the_url_allows(private_redis: PrivateRedis, client: Redis) -> None:
    store = RedisStore(f"{private_redis.url}?max_connections=3")
    before = len(client.client_list())
    store.init()
    start = threading.Barrier(24)

    def record(number: int) -> None:
        start.wait()
        for _ in range(20):
            store.record(new_message(numbered(number)))

    with ThreadPoolExecutor(24) as threads:
        list(threads.map(record, range(24)))

    assert len(client.client_list()) - before <= 3
    store.close()


def test_a_full_pool_says_what_to_do(private_redis: PrivateRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_idempotent.stores.redis.connection.CONNECT", 0.1)
    store = RedisStore(f"{private_redis.url}?max_connections=1")
    store.init()
    refused: list[StoreUnavailableError] = []

    def adopt_slowly() -> None:
        try:
            store.find(numbered(2))
        except StoreUnavailableError as error:
            refused.append(error)

    def adopt() -> object:
        other = threading.Thread(target=adopt_slowly)
        other.start()
        other.join()
        return new_message()

    store.claim(new_message(), worker="w", lease=60.0, grace=30.0, adopt=adopt)  # type: ignore[arg-type]

    (error,) = refused
    assert "max_connections=" in str(error)
    assert error.unsent
    assert store.find(numbered(2)) is None, "there is one again"
    store.close()
