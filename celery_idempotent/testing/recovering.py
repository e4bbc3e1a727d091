"""The contract of what recovery asks for: ``lapsed``, ``waiting``, ``unsent``, ``relay``, ``not_published``, ``purge``."""

# ruff: noqa: D102 - a test's name says what it shows

# Longer than most: one suite for each role of the port.

from __future__ import annotations

from datetime import timedelta
from functools import partial

from celery_idempotent.core.records import Inserted, MessageKey, ProcessedStatus, Row, Status
from celery_idempotent.core.store import LARGE_MESSAGE, Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import (
    KEY,
    LEASE,
    claim,
    done,
    expired_id,
    new_message,
    pending,
    processing,
    read,
    same_row,
    take,
    wait_until,
)

__all__ = ["RecoveryContract"]

LONG = 3600.0


def overdue(store: Store, name: str = "order:1") -> Row:
    """Return a message whose lease ran out."""
    held = processing(store, key=MessageKey(name, "t"))
    row = read(store, held.key)
    # Or it would end in the moment of its publication, where a clock ticks in milliseconds, and not be told from one published since.
    wait_until(lambda: read(store, held.key).read_at > row.read_at)
    assert store.expire(held)
    return read(store, held.key)


def _later(store: Store, row: Row) -> bool:
    return read(store, row.key).read_at > row.read_at


def ids(rows: list[Row]) -> list[str]:
    """Return the message ids, in their order."""
    return [row.key.message_id for row in rows]


class RecoveryContract(StoreFixtures):
    """What there is to recover, and taking turns at it."""

    # -- lapsed --------------------------------------------------------------------------------------------------------

    def test_leases_that_ran_out_are_listed_with_their_messages(self, store: Store) -> None:
        row = overdue(store)
        processing(store, key=MessageKey("live", "t"))
        pending(store, key=MessageKey("pending", "t"))
        done(store, key=MessageKey("done", "t"))

        (lapsed,) = store.lapsed(again_after=LONG, limit=10)

        assert (lapsed.key, lapsed.token, lapsed.message) == (row.key, row.token, row.message)

    def test_no_more_are_listed_than_asked_for(self, store: Store) -> None:
        for number in range(3):
            overdue(store, f"m{number}")
            pending(store, key=MessageKey(f"w{number}", "t"))
            pending(store, key=MessageKey(f"u{number}", "t"), published=False)
        wait_until(lambda: len(store.waiting(older_than=0.0, limit=10)) == 3)
        assert ids(store.lapsed(again_after=LONG, limit=2)) == ["m0", "m1"]
        assert ids(store.waiting(older_than=0.0, limit=2)) == ["w0", "w1"]
        assert ids(store.unsent(limit=2)) == ["u0", "u1"]

    def test_a_lapsed_message_published_again_is_listed_again_after_a_while(self, store: Store) -> None:
        row = overdue(store)
        assert store.republish(row)
        assert store.lapsed(again_after=LONG, limit=10) == []
        wait_until(lambda: ids(store.lapsed(again_after=0.0, limit=10)) == [KEY.message_id])

    def test_of_two_that_publish_a_lapsed_message_again_one_succeeds(self, store: Store) -> None:
        row = overdue(store)
        assert store.republish(row)
        assert not store.republish(row)

    def test_a_message_whose_lease_lives_is_not_published_again(self, store: Store) -> None:
        held = processing(store)
        assert not store.republish(read(store))
        store.expire(held)
        row = read(store)
        store.renew([held], lease=LEASE)
        assert not store.republish(row)

    def test_a_message_taken_over_is_not_published_again(self, store: Store) -> None:
        row = overdue(store)
        assert take(store, row) is not None
        assert not store.republish(row)

    # -- waiting -------------------------------------------------------------------------------------------------------

    def test_messages_that_wait_are_listed_with_their_messages(self, store: Store) -> None:
        row = pending(store)
        done(store, key=MessageKey("done", "t"))
        processing(store, key=MessageKey("running", "t"))
        pending(store, key=MessageKey("unsent", "t"), published=False)
        wait_until(lambda: store.waiting(older_than=0.0, limit=10) != [])
        (waiting,) = store.waiting(older_than=0.0, limit=10)
        assert (waiting.key, waiting.message) == (row.key, row.message)
        assert store.waiting(older_than=LONG, limit=10) == []

    def test_a_message_is_not_waiting_before_it_is_due(self, store: Store) -> None:
        pending(store, key=MessageKey("later", "t"), delay=LONG)
        pending(store, key=MessageKey("due", "t"), delay=-LONG)
        wait_until(lambda: store.waiting(older_than=0.0, limit=10) != [])
        assert ids(store.waiting(older_than=0.0, limit=10)) == ["due"]

    def test_messages_of_one_queue_are_listed(self, store: Store) -> None:
        pending(store, key=MessageKey("a", "t"), queue="a")
        pending(store, key=MessageKey("b", "t"), queue="b")
        wait_until(lambda: len(store.waiting(older_than=0.0, limit=10)) == 2)
        assert ids(
            store.waiting(older_than=0.0, limit=10, before={"b": read(store, MessageKey("b", "t")).read_at})
        ) == ["b"]

    def test_messages_published_before_a_moment_are_listed(self, store: Store) -> None:
        row = pending(store)
        assert row.published_at is not None
        wait_until(lambda: store.waiting(older_than=0.0, limit=10) != [])
        assert store.waiting(older_than=0.0, limit=10, before={"celery": row.published_at}) == []
        after = row.published_at + timedelta(milliseconds=1)
        assert ids(store.waiting(older_than=0.0, limit=10, before={"celery": after})) == [KEY.message_id]

    def test_a_message_published_again_waits_anew_behind_the_others(self, store: Store) -> None:
        first = pending(store, key=MessageKey("first", "t"))
        pending(store, key=MessageKey("second", "t"))
        assert store.republish(first)
        wait_until(lambda: len(store.waiting(older_than=0.0, limit=10)) == 2)
        assert ids(store.waiting(older_than=0.0, limit=10)) == ["second", "first"]

    # -- unsent --------------------------------------------------------------------------------------------------------

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

    def test_only_messages_of_some_tasks_are_listed(self, store: Store) -> None:
        for task in ("ours", "theirs"):
            pending(store, key=MessageKey("waits", task))
            pending(store, key=MessageKey("unsent", task), published=False)
            held = processing(store, key=MessageKey("lapsed", task))
            row = read(store, held.key)
            wait_until(partial(_later, store, row))
            store.expire(held)
        wait_until(lambda: len(store.waiting(older_than=0.0, limit=10)) == 2)
        soon = read(store, MessageKey("waits", "ours")).read_at + timedelta(days=1)
        for tasks, names in ((["ours"], ["ours"]), (["ours", "theirs"], ["ours", "theirs"]), ([], []), (["none"], [])):
            found = [
                store.waiting(older_than=0.0, limit=10, tasks=tasks),
                store.waiting(older_than=0.0, limit=10, before={"celery": soon, "other": soon}, tasks=tasks),
                store.unsent(limit=10, tasks=tasks),
                store.lapsed(again_after=LONG, limit=10, tasks=tasks),
            ]
            assert [sorted(row.key.task_name for row in rows) for rows in found] == [names] * 4

    def test_of_many_queues_each_has_its_own_moment(self, store: Store) -> None:
        rows = {name: pending(store, key=MessageKey(name, "t"), queue=name) for name in ("a", "b", "c")}
        wait_until(lambda: len(store.waiting(older_than=0.0, limit=10)) == 3)
        soon = read(store, MessageKey("a", "t")).read_at + timedelta(days=1)
        published = rows["b"].published_at
        assert published is not None
        before = {"a": soon, "b": published, **{f"none {number}": soon for number in range(120)}}
        assert ids(store.waiting(older_than=0.0, limit=10, before=before)) == ["a"]

    def test_large_messages_and_results_are_not_listed(self, store: Store) -> None:
        large, small = b"x" * (LARGE_MESSAGE + 1), b"x" * LARGE_MESSAGE
        for name, message in (("large", large), ("small", small)):
            pending(store, key=MessageKey(name, "t"), published=False, message=message)
        assert {row.key.message_id: row.message for row in store.unsent(limit=10)} == {"large": None, "small": small}
        assert read(store, MessageKey("large", "t")).message == large

    def test_many_messages_are_found_at_once(self, store: Store) -> None:
        keys = [pending(store, key=MessageKey(f"m{number}", "t")).key for number in range(3)]
        found = store.find_all([*keys, MessageKey("m0", "other")])
        assert {row.key for row in found} == set(keys)
        assert all(row.message is None for row in found)
        assert store.find_all([]) == []

    # -- relay ---------------------------------------------------------------------------------------------------------

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

    # -- newest ----------------------------------------------------------------------------------------------------

    def test_messages_that_ran_or_run_are_listed_newest_first(self, store: Store) -> None:
        keys = [MessageKey(f"m{number}", "t") for number in range(3)]
        done(store, key=keys[0])
        wait_until(lambda: read(store, keys[0]).read_at > read(store, keys[0]).created_timestamp)
        processing(store, key=keys[1])
        wait_until(lambda: read(store, keys[1]).read_at > read(store, keys[1]).created_timestamp)
        done(store, key=keys[2])
        pending(store, key=MessageKey("pending", "t"))
        never_ran = pending(store, key=MessageKey("cancelled", "t"))
        assert store.cancel(never_ran.key, task_id=never_ran.task_id, error="revoked")
        assert [row.key for row in store.newest(limit=10)] == keys[::-1]
        # One that runs, and the one that ended last.
        assert [row.key for row in store.newest(limit=1)] == [keys[2], keys[1]]

    # -- purge ---------------------------------------------------------------------------------------------------------

    def test_what_was_done_long_ago_is_purged(self, store: Store) -> None:
        done(store, key=MessageKey("done", "t"))
        store.fail(processing(store, key=MessageKey("failed", "t")), error="ValueError: no")
        pending(store, key=MessageKey("pending", "t"))
        processing(store, key=MessageKey("running", "t"))
        overdue(store, "overdue")

        assert store.purge(older_than=LONG, limit=10) == 0
        purged = 0

        def purge() -> bool:
            nonlocal purged
            purged += store.purge(older_than=0.0, limit=10)
            return purged == 2

        wait_until(purge)
        assert {count.status for count in store.counts()} == {Status.PENDING, Status.PROCESSING}
        assert store.record(new_message(MessageKey("done", "t"))) == Inserted()

    def test_no_more_are_purged_than_asked_for(self, store: Store) -> None:
        held = [done(store, key=MessageKey(f"m{number}", "t")) for number in range(3)]
        ended = read(store, held[-1].key).processed_timestamp
        assert ended is not None
        wait_until(lambda: read(store, held[-1].key).read_at > ended)
        assert store.purge(older_than=0.0, limit=2) == 2
        assert store.purge(older_than=0.0, limit=2) == 1
        assert store.purge(older_than=0.0, limit=2) == 0

    def test_an_id_that_stays_taken_for_longer_is_not_purged(self, store: Store) -> None:
        held = processing(store)
        store.complete(held, result=b"1", unique_for=LONG)
        ended = read(store, held.key).processed_timestamp
        assert ended is not None
        wait_until(lambda: read(store, held.key).read_at > ended)
        assert store.purge(older_than=0.0, limit=10) == 0

    def test_an_id_in_its_second_life_is_not_purged(self, store: Store) -> None:
        expired_id(store)
        store.record(new_message())
        assert store.purge(older_than=0.0, limit=10) == 0
        assert read(store).status is Status.PENDING

    def test_failures_that_can_be_requeued_are_kept_for_longer(self, store: Store) -> None:
        failed = processing(store, key=MessageKey("failed", "t"))
        store.fail(failed, error="ValueError: no")
        forgotten = processing(store, key=MessageKey("forgotten", "t"))
        store.fail(forgotten, error="ValueError: no")
        assert store.forget(read(store, forgotten.key))
        done(store, key=MessageKey("done", "t"))
        wait_until(lambda: store.purgeable(older_than=0.0) == 3)

        assert store.purgeable(older_than=0.0, failures_older_than=LONG) == 2
        assert store.purge(older_than=0.0, failures_older_than=LONG, limit=10) == 2
        assert store.purgeable(older_than=0.0, failures_older_than=LONG) == 0
        assert store.purge(older_than=0.0, failures_older_than=LONG, limit=10) == 0
        assert store.purgeable(older_than=LONG, failures_older_than=0.0) == 0
        assert store.purge(older_than=0.0, failures_older_than=0.0, limit=10) == 1
        assert store.find(failed.key) is None

    def test_only_what_is_chosen_is_purged(self, store: Store) -> None:
        for task in ("shop.charge", "shop.refund", "other"):
            done(store, key=MessageKey("done", task))
            store.fail(processing(store, key=MessageKey("failed", task)), error="ValueError: no")
        done(store, key=MessageKey("free again", "shop.charge"), unique_for=0.001)
        wait_until(lambda: store.purgeable(older_than=0.0) == 7)
        success, failure = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE

        assert store.purgeable(older_than=0.0, task_name="shop.*") == 5
        assert store.purgeable(older_than=0.0, task_name="shop?charge", processed_status=success) == 2
        assert store.purgeable(older_than=0.0, task_name="shop") == 0
        assert store.purge(older_than=0.0, limit=1, task_name="shop.*", processed_status=failure) == 1
        assert store.purge(older_than=0.0, limit=10, task_name="shop.*", processed_status=failure) == 1
        assert store.purge(older_than=0.0, limit=10, task_name="shop.charge") == 2
        assert {(count.task_name, count.processed_status) for count in store.counts()} == {
            ("shop.refund", success),
            ("other", success),
            ("other", failure),
        }
