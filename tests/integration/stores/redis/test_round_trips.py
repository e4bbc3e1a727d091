"""One script and one round trip per verb."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from redis import Redis

from celery_idempotent import RedisStore
from celery_idempotent.core.records import Claimed, Inserted, MessageKey, NewMessage
from celery_idempotent.stores.redis import pool, session
from celery_idempotent.testing.examples import GRACE, LEASE, WORKER, new_message, pending, processing
from tests.integration.stores.sql.test_round_trips import VERBS, Measured, succeeded
from tests.support.servers import PrivateRedis
from tests.support.wire_tap import WireTap

#: Scripts of one round trip: of many messages a hundred each.
SCRIPTS = {"record_all": 3}

every_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Return the commands of each round trip, as they are sent."""
    trips: list[list[Any]] = []
    ask = pool.ask

    def note(connection: pool.Connection, commands: Sequence[Sequence[Any]]) -> None:
        trips.append([command[0] for command in commands])
        ask(connection, commands)

    monkeypatch.setattr(session, "ask", note)
    return trips


def loaded(store: RedisStore, client: Redis, verb: Measured) -> Callable[[], object]:
    """Return the call to be measured, its script known to the server."""
    verb(store)()
    client.flushall()
    return verb(store)


@every_verb
def test_a_verb_is_one_script_and_one_round_trip(
    tapped_store: RedisStore, wire_tap: WireTap, client: Redis, asked: list[list[Any]], verb: Measured
) -> None:
    call = loaded(tapped_store, client, verb)
    wire_tap.listen()
    asked.clear()

    assert succeeded(call())

    assert asked == [[b"EVALSHA"] * SCRIPTS.get(verb.__name__, 1)]
    if verb.__name__ not in SCRIPTS:  # of those the first are answered while the last are sent
        assert len(wire_tap.asked) == 1, wire_tap.asked


def test_the_server_counts_the_same(tapped_store: RedisStore, client: Redis) -> None:
    def run(number: int) -> None:
        held = processing(tapped_store, key=MessageKey(f"m{number}", "t"))
        tapped_store.renew([held], lease=LEASE)
        tapped_store.complete(held, result=b"1")

    run(0)
    client.config_resetstat()
    for number in range(1, 11):
        run(number)
    calls = {name: stats["calls"] for name, stats in client.info("commandstats").items()}
    assert calls["cmdstat_evalsha"] == 40
    # What the connection, this one and the scripts themselves do besides.
    ours = {"cmdstat_eval", "cmdstat_ping", "cmdstat_script|load", "cmdstat_multi", "cmdstat_exec", "cmdstat_hello"}
    assert ours.isdisjoint(calls), calls


def test_an_absent_message_is_claimed_by_two(tapped_store: RedisStore, wire_tap: WireTap) -> None:
    def claim(name: str) -> object:
        message = new_message(MessageKey(name, "t"))
        return tapped_store.claim(message, worker=WORKER, lease=LEASE, grace=GRACE, adopt=lambda: message)

    claim("first")
    wire_tap.listen()
    assert isinstance(claim("second"), Claimed)
    assert len(wire_tap.asked) == 2


def test_a_script_is_loaded_when_the_server_does_not_know_it(
    tapped_store: RedisStore, wire_tap: WireTap, client: Redis, asked: list[list[Any]]
) -> None:
    def record_all(name: str) -> list[Any]:
        return tapped_store.record_all([new_message(MessageKey(f"{name} {number}", "t")) for number in range(150)])

    record_all("before")
    client.script_flush()
    asked.clear()
    assert record_all("after") == [Inserted()] * 150
    assert asked == [[b"EVALSHA"] * 2, [b"SCRIPT"], [b"EVALSHA"] * 2]
    asked.clear()
    record_all("later")
    assert asked == [[b"EVALSHA"] * 2]


def test_an_emptied_server_starts_over(private_redis: PrivateRedis, store: RedisStore, client: Redis) -> None:
    pending(store)
    client.flushall()
    client.script_flush()
    assert store.purge(older_than=0.0, limit=10) == 0
    assert store.unsent(limit=10) == []
    pending(store)


def test_a_thousand_messages_are_two_round_trips(tapped_store: RedisStore, asked: list[list[Any]]) -> None:
    tapped_store.record(new_message())
    messages: list[NewMessage] = [new_message(MessageKey(f"m{number}", "t"), published=False) for number in range(1000)]
    asked.clear()
    tapped_store.record_all(messages)
    assert [len(trip) for trip in asked] == [5, 5]
    tapped_store.unsent(limit=1)
    asked.clear()
    assert [row.key for row in tapped_store.unsent(limit=1000)] == [message.key for message in messages]
    # Where they are, at one moment in all shards; and then what they are.
    assert [len(trip) for trip in asked] == [16 + 2, 5, 5]
    asked.clear()
    tapped_store.relayed([message.key for message in messages], published=True)
    assert sum(trip.count(b"EVALSHA") for trip in asked if b"SCRIPT" not in trip) <= 20


def test_a_recovery_pass_at_rest_is_a_few_round_trips(tapped_store: RedisStore, asked: list[list[Any]]) -> None:
    def run_pass() -> None:
        assert tapped_store.lapsed(again_after=1.0, limit=200) == []
        assert tapped_store.unsent(limit=200) == []
        assert tapped_store.purge(older_than=0.0, limit=200) == 0
        assert tapped_store.waiting(older_than=0.0, limit=200, before={"celery": datetime.now(UTC)}) == []

    run_pass()
    asked.clear()
    run_pass()
    assert len(asked) == 4
