"""The contract of ``purge``."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from celery_idempotent.core.records import Inserted, MessageKey, ProcessedStatus, Status
from celery_idempotent.core.store import Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import (
    done,
    expired_id,
    new_message,
    overdue,
    pending,
    processing,
    read,
    wait_until,
)

__all__ = ["PurgeContract"]

LONG = 3600.0


class PurgeContract(StoreFixtures):
    """``purge`` deletes messages done for long enough, and no others."""

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
