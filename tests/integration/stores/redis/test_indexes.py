"""Every row is in the one index that its columns say, and a removed row is in none."""

from __future__ import annotations

import random
from typing import Any

import pytest
from redis import Redis
from redis.crc import key_slot

from celery_idempotent import RedisStore
from celery_idempotent.core.records import Claim, Inserted, MessageKey, RowFilter
from celery_idempotent.stores.redis.layout import SHARDS, Layout, identity, key_of
from celery_idempotent.testing.examples import done, new_message, pending, processing, read, wait_until
from tests.integration.stores.redis.random_verbs import call_random_verb

QUEUES = (None, "a", "b")
VERBS = (
    *("record", "record_all", "withdraw", "resubmit", "republish", "count"),
    *(
        "claim",
        "claim",
        "take_over",
        "renew",
        "keep_steps",
        "checkpoint",
        "complete",
        "complete",
        "fail",
        "retry",
        "release",
        "expire",
    ),
    *("abandon", "cancel", "forbid", "relay", "relayed", "not_published"),
)


def indexed(client: Redis) -> dict[str, list[tuple[bytes, float]]]:
    """Return what is in each kind of index, over all shards."""
    found: dict[str, list[tuple[bytes, float]]] = {}
    for key in client.scan_iter(match="{queue_log:*"):
        kind = key.decode().partition("}:")[2]
        if client.type(key) == b"zset":
            found.setdefault(kind, []).extend(client.zrange(key, 0, -1, withscores=True))  # type: ignore[arg-type]
    return {kind: sorted(members) for kind, members in found.items()}


def expected(client: Redis) -> dict[str, list[tuple[bytes, float]]]:
    """Return what has to be in them, by the rows."""
    found: dict[str, list[tuple[bytes, float]]] = {}

    def put(kind: str, ident: bytes, moment: bytes | float) -> None:
        found.setdefault(kind, []).append((ident, float(moment)))

    for key in client.scan_iter(match="{queue_log:*}:row:*"):
        ident = key.partition(b"}:row:")[2]
        row: dict[bytes, bytes] = client.hgetall(key)  # type: ignore[assignment]
        match row[b"status"]:
            case b"pending" if b"published_at" in row:
                since = max(float(row[b"published_at"]), float(row.get(b"available_at", 0)))
                put(f"waiting:{row[b'queue'].decode()}" if b"queue" in row else "waiting", ident, since)
            case b"pending":
                put("unsent", ident, row[b"created_timestamp"])
            case b"processing":
                put("running", ident, row[b"lease_expires_at"])
            case b"done":
                # One that has been free for a while may have been moved by a purge.
                put(
                    "kept" if b"expires_at" in row else "done",
                    ident,
                    row.get(b"expires_at", row[b"processed_timestamp"]),
                )
                if b"worker" in row:
                    put("recent", ident, row[b"processed_timestamp"])
    return {kind: sorted(members) for kind, members in found.items()}


def queues(client: Redis) -> set[bytes]:
    found: set[bytes] = set()
    for key in client.scan_iter(match="{queue_log:*}:queues"):
        members: Any = client.smembers(key)
        found |= members
    return found


@pytest.mark.parametrize("seed", range(8))
def test_rows_and_indexes_agree_after_random_verbs(store: RedisStore, client: Redis, seed: int) -> None:
    chance, claims = random.Random(seed), dict[MessageKey, Claim]()
    for _ in range(150):
        call_random_verb(store, chance, claims)
        assert indexed(client) == expected(client)
    waiting = {kind for kind in indexed(client) if kind.startswith("waiting")}
    assert {queue.decode().removeprefix(":") for queue in queues(client)} == waiting
    big = {key.partition(b"}:big:")[2] for key in client.scan_iter(match="{queue_log:*}:big:*")}
    assert big <= {key.partition(b"}:row:")[2] for key in client.scan_iter(match="{queue_log:*}:row:*")}


def test_nothing_is_left_of_what_was_purged(store: RedisStore, client: Redis) -> None:
    before = set(client.scan_iter())
    for number in range(40):
        done(store, key=MessageKey(f"m{number}", "t"))
        store.fail(processing(store, key=MessageKey(f"f{number}", "t")), error="E", unique_for=0.0)
        store.cancel(pending(store, key=MessageKey(f"c{number}", "t")).key, task_id="task-1", error="revoked")
    purged = 0

    def purge() -> bool:
        nonlocal purged
        purged += store.purge(older_than=0.0, limit=7)
        return purged == 120

    wait_until(purge)
    assert set(client.scan_iter()) == before


def test_an_unfinished_row_has_no_time_to_live(store: RedisStore, client: Redis) -> None:
    pending(store, key=MessageKey("sent", "t"))
    pending(store, key=MessageKey("unsent", "t"), published=False)
    processing(store)
    done(store, key=MessageKey("done", "t"), unique_for=60.0)
    assert {client.ttl(key) for key in client.scan_iter()} == {-1}


def test_rows_are_kept_compactly(store: RedisStore, client: Redis) -> None:
    held = processing(store, message=b"m" * 5000)
    store.complete(held, result=b"r" * 5000)
    (row,) = client.scan_iter(match="{queue_log:*}:row:*")
    assert client.object("encoding", row) == b"listpack"
    assert read(store).result == b"r" * 5000


def test_recent_ones_are_bounded_and_the_newest_stay(store: RedisStore, client: Redis) -> None:
    keys = [MessageKey(f"m{number}", "t") for number in range(40)]
    for key in keys:
        done(store, key=key)
    assert {row.key for row in store.newest(limit=3)} == set(keys[-3:])


def test_the_shards_of_a_log_are_spread_over_the_slots() -> None:
    for table in ("queue_log", "ops.queue_log", "żółw"):
        slots = [key_slot(tag) for tag in Layout(table).tags]
        assert [each * SHARDS // 16384 for each in slots] == list(range(SHARDS))


@pytest.mark.parametrize("key", [MessageKey("a:b", "c:d"), MessageKey("", "t"), MessageKey("🐇\n{}", "ż")])
def test_an_identity_tells_its_key(store: RedisStore, key: MessageKey) -> None:
    assert key_of(identity(key)) == key
    pending(store, key=key, message=b"m")
    assert [row.key for row in store.rows(RowFilter())] == [key]
    assert read(store, key).message == b"m"
    assert store.record(new_message(MessageKey(key.message_id + "x", key.task_name))) == Inserted()


def test_an_identity_knows_a_key_that_may_not_be_recorded() -> None:
    key = MessageKey("\udcff🐇\0{}", "ż")
    assert key_of(identity(key)) == key
