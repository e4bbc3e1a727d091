"""Connections that break, servers that are frozen, full, replaced or not there; and rows that are damaged."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from redis import Redis

from celery_idempotent import RedisStore
from celery_idempotent.core.records import (
    Claim,
    Duplicate,
    Inserted,
    MessageKey,
    RowFilter,
    Status,
)
from celery_idempotent.core.store import Store
from celery_idempotent.errors import ConfigurationError, SchemaError, StoreError, StoreUnavailableError
from celery_idempotent.stores.redis import connection
from celery_idempotent.stores.redis.layout import Layout
from celery_idempotent.stores.redis.pool import Call
from celery_idempotent.stores.redis.scripts import Script
from celery_idempotent.stores.redis.session import ScriptSession
from celery_idempotent.testing.examples import (
    GRACE,
    KEY,
    LEASE,
    WORKER,
    claim,
    new_message,
    pending,
    processing,
    read,
    try_claim,
)
from tests.integration.stores.broken_connections import (
    ENDINGS,
    BrokenConnectionContract,
    InterruptedByTestError,
    interrupted_when,
)
from tests.integration.stores.redis.random_verbs import call_random_verb
from tests.support.servers import PrivateRedis
from tests.support.waiting import wait_until
from tests.support.wire_tap import WireTap

# -- stale connections ------------------------------------------------------------------------------------------------------


def test_a_connection_that_the_server_ended_is_replaced(store: RedisStore, client: Redis) -> None:
    pending(store)
    client.client_kill_filter(_type="normal", skipme=True)
    wait_until(lambda: len(client.client_list()) == 1)
    held = claim(store)
    assert store.complete(held, result=b"1")


def test_a_server_that_was_restarted_is_found_again(private_redis: PrivateRedis, store: RedisStore) -> None:
    pending(store)
    private_redis.kill()
    with pytest.raises(StoreUnavailableError) as caught:
        claim(store)
    assert caught.value.unsent
    private_redis.start()
    assert claim(store) == Claim(KEY, 1)


class TestRedis(BrokenConnectionContract):
    answers_of_a_claim = 2

    def open_at(self, port: int) -> RedisStore:
        return RedisStore(f"redis://shop:hunter2@127.0.0.1:{port}/3")

    def use_before(self, ending: str, store: Store) -> None:
        ENDINGS[ending](store, processing(store))
        store.cancel(KEY, task_id="task-1", error="revoked", unique_for=0.0)
        if read(store).status is Status.PROCESSING:
            store.complete(Claim(KEY, 1), result=None, unique_for=0.0)
        wait_until(lambda: store.purge(older_than=0.0, limit=10) == 1)


def test_many_records_whose_answers_were_lost_are_recorded(tapped_store: RedisStore, wire_tap: WireTap) -> None:
    pending(tapped_store, key=MessageKey("there", "t"), task_id="task-0")
    names = ("there", "new", "newer", "new")
    messages = [new_message(MessageKey(name, "t")) for name in names]
    wire_tap.cut()
    assert [type(answer) for answer in tapped_store.record_all(messages)] == [Duplicate, Inserted, Inserted, Duplicate]


# -- no answer at all ---------------------------------------------------------------------------------------------------------


def test_a_connection_that_breaks_twice_is_unavailable(tapped_store: RedisStore, wire_tap: WireTap) -> None:
    pending(tapped_store)
    claim(tapped_store, new_message(MessageKey("load the script", "t")))
    wire_tap.cut(times=20)  # a greeting is an answer too
    with pytest.raises(StoreUnavailableError) as caught:
        tapped_store.claim(new_message(), worker=WORKER, lease=LEASE, grace=GRACE)
    assert not caught.value.unsent


def test_a_frozen_server_does_not_hang_its_callers(
    private_redis: PrivateRedis, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ANSWER", 1.0)
    with closing(RedisStore(private_redis.url)) as old, closing(RedisStore(private_redis.url)) as new:
        old.record(new_message(MessageKey("before", "t")))
        private_redis.pause()
        with pytest.raises(StoreUnavailableError, match="gave no answer in time") as in_flight:
            old.record(new_message(MessageKey("m-2", "t")))
        with pytest.raises(StoreUnavailableError, match="cannot be reached") as unsent:
            new.record(new_message(MessageKey("m-3", "t")))
        private_redis.resume()
        assert not in_flight.value.unsent
        assert unsent.value.unsent
        # It was frozen, not deaf: what it had been asked is done as soon as it can.
        wait_until(lambda: old.find(MessageKey("m-2", "t")))
        assert isinstance(old.record(new_message(MessageKey("m-2", "t"), task_id="other")), Duplicate)
        assert new.record(new_message(MessageKey("m-3", "t"))) == Inserted()


def test_a_full_server_refuses_new_messages_and_finishes_old_ones(store: RedisStore, client: Redis) -> None:
    row = pending(store)
    pending(store, key=MessageKey("other", "t"))
    client.config_set("maxmemory", 1)
    with pytest.raises(StoreUnavailableError, match="used memory > 'maxmemory'") as caught:
        store.record(new_message(MessageKey("new", "t")))
    assert caught.value.unsent
    assert store.find(MessageKey("new", "t")) is None
    held = claim(store)
    store.count_duplicate(KEY)
    assert store.renew([held], lease=2 * LEASE) == []
    assert store.checkpoint(held, result=b"1")
    assert store.expire(held)
    assert store.complete(held, result=b"1")
    assert store.republish(read(store, MessageKey("other", "t")))
    assert row.key == held.key
    client.config_set("maxmemory", 0)
    assert store.record(new_message(MessageKey("new", "t"))) == Inserted()


def test_a_replica_is_no_place_to_write(private_redis: PrivateRedis) -> None:
    with PrivateRedis(replica_of=private_redis) as replica, closing(RedisStore(replica.url)) as store:
        with pytest.raises(StoreUnavailableError, match="is on a replica") as caught:
            store.record(new_message())
        assert caught.value.unsent


def test_a_batch_that_a_demotion_cuts_in_two_is_repeated_as_such(store: RedisStore) -> None:
    """Its first script took effect, and may be on the new master: a repeat has to know that."""
    tag = Layout("queue_log").tags[0]
    takes_effect = Call(Script("return redis.call('INCR', tag .. ':tries')"), (tag,), ())
    is_refused = Call(
        Script("return redis.error_reply('READONLY You can not write against a read only replica.')"), (tag,), ()
    )
    retries: list[bool] = []

    def batch(on: ScriptSession) -> list[object]:
        retries.append(on.is_retry)
        return on.send([takes_effect, is_refused])

    with pytest.raises(StoreUnavailableError, match="is on a replica") as caught:
        store._server.run(batch)

    assert retries == [False, True]
    assert not caught.value.unsent


# -- damage -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["status", "processed_status", "created_timestamp", "token"])
def test_a_damaged_row_raises(store: RedisStore, client: Redis, column: str) -> None:
    processing(store)
    (row,) = client.scan_iter(match="{queue_log:*}:row:*")
    client.hset(row, column, "nonsense")
    for ask in (partial(store.find, KEY), partial(store.record, new_message()), partial(try_claim, store)):
        with pytest.raises(StoreError, match=f"row of '{KEY.message_id}' and '{KEY.task_name}' is damaged"):
            ask()
    if column.endswith("status"):
        with pytest.raises(StoreError, match="is damaged"):
            store.counts()


def test_a_foreign_key_raises(store: RedisStore, client: Redis) -> None:
    pending(store)
    (row,) = client.scan_iter(match="{queue_log:*}:row:*")
    client.set(row, "a string")
    with pytest.raises(StoreError, match="refused: WRONGTYPE") as caught:
        store.find(KEY)
    assert not isinstance(caught.value, StoreUnavailableError)


def test_another_layout_is_refused(private_redis: PrivateRedis, store: RedisStore, client: Redis) -> None:
    (layout,) = client.scan_iter(match="{queue_log:*}:layout")
    client.set(layout, "2")
    with closing(RedisStore(private_redis.url)) as other:
        for verb in (other.check, other.init, lambda: other.record(new_message())):
            with pytest.raises(SchemaError, match=r"has layout 2, and this version .* writes layout 1"):
                verb()


# -- processes, threads, signals ----------------------------------------------------------------------------------------------


def test_a_time_limit_in_an_answer_breaks_no_connection(
    private_redis: PrivateRedis, store: RedisStore, client: Redis
) -> None:
    held = processing(store)
    assert store.find(KEY)
    client.client_pause(2000)
    began = threading.Event()
    timer = threading.Timer(0.3, began.set)
    timer.start()
    with interrupted_when(began.is_set), pytest.raises(InterruptedByTestError):
        store.complete(held, result=b"first")
    assert read(store).key == KEY
    assert store.complete(held, result=b"1")


def test_children_have_connections_of_their_own(store: RedisStore, client: Redis) -> None:
    pending(store)
    written, stopped = [0], threading.Event()

    def write() -> None:
        while not stopped.is_set():
            written[0] += 1
            store.record(new_message(MessageKey(f"parent:{written[0]}", "t")))

    thread = threading.Thread(target=write)
    thread.start()
    wait_until(lambda: written[0])
    try:
        for number in range(10):
            assert in_a_child(lambda number=number: store.record(new_message(MessageKey(f"child:{number}", "t"))))  # type: ignore[misc]
            assert read(store).key == KEY
    finally:
        stopped.set()
        thread.join()
    assert len(list(store.rows(RowFilter(message_id="child:*")))) == 10


def in_a_child(call: Callable[[], object]) -> bool:
    """Return whether a child that is forked now comes to an end with it."""
    pid = os.fork()
    if not pid:  # pragma: no cover - in the child
        try:
            call()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == 0


def test_a_closed_store_leaves_no_connection(store: RedisStore, client: Redis) -> None:
    pending(store)
    assert len(client.client_list()) == 2
    store.close()
    wait_until(lambda: len(client.client_list()) == 1)


def test_braces_have_no_place_in_a_table(private_redis: PrivateRedis) -> None:
    for table in ("", "a{b", "{}"):
        with pytest.raises(ConfigurationError, match="a name without braces"):
            RedisStore(private_redis.url, table=table)


PAGE = Path(__file__).parents[4] / "docs" / "how-to" / "redis-store.md"


def test_an_account_needs_no_other_rights_than_the_page_tells(private_redis: PrivateRedis, client: Redis) -> None:
    rights = PAGE.read_text().partition("no more rights than these:\n\n```\n")[2].partition("```")[0].split()
    assert "resetkeys" in rights
    client.execute_command("ACL", "SETUSER", "shop", "on", ">secret", *rights)  # type: ignore[no-untyped-call]
    url = private_redis.url.replace("redis://", "redis://shop:secret@")
    with closing(RedisStore(url)) as store:
        for seed in range(3):
            chance, claims = random.Random(seed), dict[MessageKey, Claim]()
            for _ in range(150):
                call_random_verb(store, chance, claims)
        store.counts()
        store.newest(limit=9)
        store.lapsed(again_after=0.0, limit=9)
        store.waiting(older_than=0.0, limit=9)
        store.unsent(limit=9)
        store.purge(older_than=0.0, limit=9, failures_older_than=3600.0)
        assert list(store.rows(RowFilter()))
    with closing(RedisStore(url, table="other")) as store, pytest.raises(StoreError, match="refused"):
        store.record(new_message())
