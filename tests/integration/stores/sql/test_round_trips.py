"""A hot path of one statement and one round trip per verb."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from celery_idempotent.core.records import Duplicate, MessageKey, NotClaimed, Owner
from celery_idempotent.core.store import Store
from celery_idempotent.stores.sql import SQLStore
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
)
from tests.support.wire_tap import WireTap

#: A verb, by how it is prepared: the preparation answers with the call to be measured.
Measured = Callable[[Store], Callable[[], object]]


def record(store: Store) -> Callable[[], object]:
    return partial(store.record, new_message(delay=5.0))


def claim_pending(store: Store) -> Callable[[], object]:
    pending(store)
    return partial(store.claim, new_message(), worker=WORKER, lease=LEASE, grace=GRACE)


def renew(store: Store) -> Callable[[], object]:
    return partial(store.renew, [processing(store)], lease=LEASE)


def checkpoint(store: Store) -> Callable[[], object]:
    return partial(store.checkpoint, processing(store), result=b"1")


def keep_steps(store: Store) -> Callable[[], object]:
    return partial(store.keep_steps, processing(store), steps=b"1")


def complete(store: Store) -> Callable[[], object]:
    return partial(store.complete, processing(store), result=b"1", unique_for=60.0)


def fail(store: Store) -> Callable[[], object]:
    return partial(store.fail, processing(store), error="ValueError: no")


def fail_by_worker(store: Store) -> Callable[[], object]:
    processing(store)
    return partial(store.fail, Owner(KEY, WORKER), error="ValueError: no")


def retry(store: Store) -> Callable[[], object]:
    return partial(store.retry, processing(store), new_message(attempt=1))


def release(store: Store) -> Callable[[], object]:
    return partial(store.release, processing(store))


def expire(store: Store) -> Callable[[], object]:
    return partial(store.expire, processing(store))


def take_over(store: Store) -> Callable[[], object]:
    store.expire(processing(store))
    return partial(store.take_over, read(store), task_id="task-2", worker="b", lease=LEASE, attempt=0)


def abandon(store: Store) -> Callable[[], object]:
    store.expire(processing(store))
    return partial(store.abandon, read(store), error="abandoned")


def cancel(store: Store) -> Callable[[], object]:
    pending(store)
    return partial(store.cancel, KEY, task_id="task-1", error="revoked")


def forbid(store: Store) -> Callable[[], object]:
    processing(store)
    return partial(store.forbid, read(store), error="revoked")


def withdraw(store: Store) -> Callable[[], object]:
    pending(store)
    return partial(store.withdraw, KEY, task_id="task-1")


def resubmit(store: Store) -> Callable[[], object]:
    store.fail(processing(store), error="ValueError: no")
    return partial(store.resubmit, read(store), new_message(task_id="task-2"))


def republish(store: Store) -> Callable[[], object]:
    return partial(store.republish, pending(store))


def record_all(store: Store) -> Callable[[], object]:
    return partial(store.record_all, [new_message(MessageKey(f"m{number}", "t")) for number in range(300)])


def relay(store: Store) -> Callable[[], object]:
    return partial(store.relay, pending(store, published=False), lease=LEASE)


def relayed(store: Store) -> Callable[[], object]:
    keys = [pending(store, key=MessageKey(f"m{number}", "t"), published=False).key for number in range(30)]
    return partial(store.relayed, keys, published=True)


def doubt(store: Store) -> Callable[[], object]:
    return partial(store.doubt, [pending(store, key=MessageKey(f"m{number}", "t")).key for number in range(30)])


def count_duplicate(store: Store) -> Callable[[], object]:
    pending(store)
    return partial(store.count_duplicate, KEY)


def find(store: Store) -> Callable[[], object]:
    pending(store)
    return partial(store.find, KEY)


def forget(store: Store) -> Callable[[], object]:
    processing(store)
    return partial(store.forget, read(store))


VERBS: list[Measured] = [
    *(record, claim_pending, renew, keep_steps, checkpoint, complete, fail, fail_by_worker, retry),
    *(release, expire, take_over),
    *(abandon, cancel, forbid, withdraw, resubmit, republish, count_duplicate, find),
    *(record_all, relay, relayed, doubt, forget),
]

every_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
on_servers = pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)


def succeeded(answer: object) -> bool:
    return answer is not False and not isinstance(answer, Duplicate | NotClaimed)


@every_verb
def test_a_verb_is_one_statement(store: SQLStore, statements: list[str], verb: Measured) -> None:
    call = verb(store)
    statements.clear()

    assert succeeded(call())

    assert len(statements) == 1, statements


@on_servers
@every_verb
def test_a_verb_is_one_round_trip(tapped_store: SQLStore, wire_tap: WireTap, verb: Measured) -> None:
    call = verb(tapped_store)
    wire_tap.listen()

    assert succeeded(call())

    assert len(wire_tap.asked) == 1, wire_tap.asked


@on_servers
def test_no_transaction_is_begun_or_ended(tapped_store: SQLStore, wire_tap: WireTap) -> None:
    wire_tap.listen()

    for number in range(8):  # often enough for the driver to prepare the statements
        held = processing(tapped_store, task_id=f"task-{number}")
        tapped_store.renew([held], lease=LEASE)
        tapped_store.complete(held, result=b"1", unique_for=0.0)
        # Its id is free again, so that the next round is the same.

    said = b"".join(wire_tap.asked).upper()
    assert b"UPDATE" in said
    for word in (b"BEGIN", b"COMMIT", b"ROLLBACK", b"START TRANSACTION", b"AUTOCOMMIT"):
        assert word not in said
    assert b"SELECT 1" not in said  # nor is the connection asked whether it still lives
    assert wire_tap.connections == 1


@on_servers
def test_a_store_on_a_given_engine_uses_autocommit(store: SQLStore, store_url: str) -> None:
    owned = SQLStore(store.engine)
    assert owned.engine is store.engine
    held = processing(owned)
    # Another connection sees it at once.
    assert read(store).token == held.token
    assert claim(owned, new_message(task_id="x", key=type(KEY)("other", "t"))).token == 1
