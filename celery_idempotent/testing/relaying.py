"""The contract of the relay's verbs: ``unsent``, ``relay``, ``relayed``, ``not_published``."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from celery_idempotent.core.records import MessageKey
from celery_idempotent.core.store import Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import (
    KEY,
    LEASE,
    claim,
    done,
    ids,
    new_message,
    overdue,
    pending,
    read,
    same_row,
    wait_until,
)

__all__ = ["RelayContract"]

LONG = 3600.0


class RelayContract(StoreFixtures):
    """Messages that are committed but not published, and the right to publish them."""

    def test_messages_left_to_the_relay_are_listed_until_published(self, store: Store) -> None:
        row = pending(store, published=False)
        pending(store, key=MessageKey("sent", "t"))
        (unsent,) = store.unsent(limit=10)
        assert (unsent.key, unsent.message) == (row.key, row.message)
        assert store.republish(unsent)
        assert store.unsent(limit=10) == []

    def test_they_are_listed_in_the_order_in_which_they_were_recorded(self, store: Store) -> None:
        names = [f"m{number}" for number in (3, 1, 2)]
        for name in names:
            pending(store, key=MessageKey(name, "t"), published=False)
        many = [f"n{number}" for number in (5, 4, 6)]
        store.record_all([new_message(MessageKey(name, "t"), published=False) for name in many])
        assert ids(store.unsent(limit=10)) == names + many

    def test_of_two_relays_one_has_the_right_to_publish(self, store: Store) -> None:
        row = pending(store, published=False)
        assert store.relay(row, lease=LEASE)
        assert not store.relay(row, lease=LEASE)
        assert 0 < read(store).lease_left <= LEASE
        assert ids(store.unsent(limit=10)) == [KEY.message_id]

    def test_a_relay_that_dies_leaves_it_to_others(self, store: Store) -> None:
        row = pending(store, published=False)
        assert store.relay(row, lease=0.001)
        wait_until(lambda: store.relay(row, lease=LEASE))

    def test_its_recorder_publishes_it_first(self, store: Store) -> None:
        row = pending(store, published=False, publish_within=LEASE)
        assert 0 < row.lease_left <= LEASE
        assert not store.relay(row, lease=LEASE)
        store.relayed([row.key], published=False)
        assert store.relay(row, lease=LEASE)

    def test_what_was_published_or_claimed_is_not_relayed(self, store: Store) -> None:
        assert not store.relay(pending(store, key=MessageKey("sent", "t")), lease=LEASE)
        row = pending(store, published=False)
        held = claim(store)
        before = read(store)
        assert not store.relay(row, lease=LEASE)
        store.relayed([row.key], published=True)
        store.relayed([row.key], published=False)
        assert same_row(read(store), before)
        assert store.renew([held], lease=LEASE) == []

    def test_what_was_relayed_is_noted(self, store: Store) -> None:
        rows = [pending(store, key=MessageKey(f"m{number}", "t"), published=False) for number in range(3)]
        assert store.relay(rows[0], lease=LEASE)
        store.relayed([row.key for row in rows[:2]], published=True)
        assert ids(store.unsent(limit=10)) == ["m2"]
        for row in rows[:2]:
            after = read(store, row.key)
            assert after.published_at is not None
            assert after.lease_expires_at is None
        store.relayed([], published=True)

    def test_a_right_that_was_given_up_is_anybodys(self, store: Store) -> None:
        row = pending(store, published=False)
        assert store.relay(row, lease=LEASE)
        store.relayed([KEY], published=False)
        after = read(store)
        assert (after.lease_expires_at, after.published_at) == (None, None)
        assert store.relay(row, lease=LEASE)

    def test_what_is_being_published_may_be_claimed(self, store: Store) -> None:
        pending(store, published=False, publish_within=LEASE)
        claim(store)

    def test_a_publication_that_failed_is_taken_back(self, store: Store) -> None:
        row = pending(store, published=False)
        store.republish(row)
        store.not_published(KEY, token=row.token)
        assert ids(store.unsent(limit=10)) == [KEY.message_id]

    def test_a_publication_that_was_claimed_is_not_taken_back(self, store: Store) -> None:
        row = pending(store)
        claim(store)
        store.not_published(KEY, token=row.token)
        assert read(store).published_at is not None

    def test_a_lapsed_message_whose_publication_failed_is_listed_at_once(self, store: Store) -> None:
        row = overdue(store)
        assert store.republish(row)
        store.not_published(row.key, token=row.token)
        (lapsed,) = store.lapsed(again_after=LONG, limit=10)
        assert (lapsed.key, lapsed.published_at) == (row.key, None)
        assert store.republish(lapsed)

    def test_a_publication_of_what_is_done_since_is_not_taken_back(self, store: Store) -> None:
        held = done(store)
        before = read(store)
        store.not_published(KEY, token=held.token)
        assert same_row(read(store), before)
