"""The contract of the producer's other verbs: ``withdraw``, ``resubmit``, ``republish``, ``count_duplicate``."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from celery_idempotent.core.records import Inserted, Status
from celery_idempotent.core.store import Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import (
    KEY,
    claim,
    done,
    expired_id,
    new_message,
    pending,
    processing,
    read,
    same_row,
)

__all__ = ["PublishContract"]


class PublishContract(StoreFixtures):
    """What a producer does with a recorded message if publishing fails, may have failed, or is repeated."""

    # -- withdraw ------------------------------------------------------------------------------------------------------

    def test_a_pending_message_is_withdrawn_and_can_be_recorded_again(self, store: Store) -> None:
        pending(store)
        assert store.withdraw(KEY, task_id="task-1")
        assert store.find(KEY) is None
        assert store.record(new_message(task_id="task-2")) == Inserted()

    def test_a_message_of_another_task_id_is_not_withdrawn(self, store: Store) -> None:
        before = pending(store)
        assert not store.withdraw(KEY, task_id="task-2")
        assert same_row(read(store), before)

    def test_an_absent_message_is_not_withdrawn(self, store: Store) -> None:
        assert not store.withdraw(KEY, task_id="task-1")

    def test_a_running_message_is_not_withdrawn(self, store: Store) -> None:
        processing(store)
        assert not store.withdraw(KEY, task_id="task-1")

    def test_a_message_that_waits_for_its_retry_is_not_withdrawn(self, store: Store) -> None:
        store.retry(processing(store), new_message(attempt=1))
        assert not store.withdraw(KEY, task_id="task-1")

    def test_a_released_message_is_not_withdrawn(self, store: Store) -> None:
        store.release(processing(store))
        assert not store.withdraw(KEY, task_id="task-1")

    def test_a_finished_message_is_not_withdrawn(self, store: Store) -> None:
        done(store)
        assert not store.withdraw(KEY, task_id="task-1")

    def test_a_withdrawn_second_life_keeps_its_token(self, store: Store) -> None:
        old = expired_id(store)
        store.record(new_message(task_id="task-2"))

        assert store.withdraw(KEY, task_id="task-2")

        assert store.record(new_message(task_id="task-3")) == Inserted()
        assert claim(store, new_message(task_id="task-3")).token > old.token

    # -- resubmit ------------------------------------------------------------------------------------------------------

    def test_a_failed_message_is_resubmitted(self, store: Store) -> None:
        held = processing(store)
        store.fail(held, error="ValueError: no", unique_for=3600.0)
        failed = read(store)

        message = new_message(task_id="task-2", queue="slow", message=b"again", attempt=0, delay=5.0)
        assert store.resubmit(failed, message)

        row = read(store)
        assert (row.status, row.processed_status, row.processed_timestamp) == (Status.PENDING, None, None)
        assert (row.task_id, row.queue, row.message, row.attempt) == ("task-2", "slow", b"again", 0)
        assert (row.error, row.expires_at, row.result, row.lease_expires_at) == (None, None, None, None)
        assert (row.token, row.created_timestamp) == (held.token, failed.created_timestamp)
        assert 0 < row.available_in <= 5.0
        assert row.published_at is not None
        assert claim(store, message).token == held.token + 1

    def test_of_two_resubmissions_one_succeeds(self, store: Store) -> None:
        store.fail(processing(store), error="ValueError: no")
        failed = read(store)
        assert store.resubmit(failed, new_message(task_id="task-2"))
        assert not store.resubmit(failed, new_message(task_id="task-3"))
        assert read(store).task_id == "task-2"

    def test_a_message_that_failed_again_since_is_not_resubmitted(self, store: Store) -> None:
        store.fail(processing(store), error="ValueError: no")
        failed = read(store)
        store.resubmit(failed, new_message())
        store.fail(claim(store), error="ValueError: no")
        assert not store.resubmit(failed, new_message(task_id="task-2"))

    def test_a_successful_message_is_not_resubmitted(self, store: Store) -> None:
        done(store)
        assert not store.resubmit(read(store), new_message(task_id="task-2"))

    def test_a_resubmitted_message_can_be_withdrawn_and_keeps_its_token(self, store: Store) -> None:
        old = processing(store)
        store.fail(old, error="ValueError: no")
        store.resubmit(read(store), new_message(task_id="task-2"))

        assert store.withdraw(KEY, task_id="task-2")

        assert store.record(new_message(task_id="task-3")) == Inserted()
        assert claim(store).token > old.token

    # -- republish -----------------------------------------------------------------------------------------------------

    def test_of_two_republications_one_succeeds(self, store: Store) -> None:
        row = pending(store)
        assert store.republish(row)
        assert not store.republish(row)
        again = read(store)
        assert again.published_at is not None
        assert row.published_at is not None
        assert again.published_at > row.published_at
        assert store.republish(again)

    def test_a_message_left_to_the_relay_is_published_once(self, store: Store) -> None:
        row = pending(store, published=False)
        assert store.republish(row)
        assert not store.republish(row)
        assert read(store).published_at is not None

    def test_a_message_claimed_since_is_not_republished(self, store: Store) -> None:
        row = pending(store)
        held = claim(store)
        assert not store.republish(row)
        store.release(held)
        assert not store.republish(row)

    # -- count_duplicate -----------------------------------------------------------------------------------------------

    def test_duplicates_are_counted_in_every_status(self, store: Store) -> None:
        pending(store)
        store.count_duplicate(KEY)
        held = claim(store)
        store.count_duplicate(KEY)
        store.complete(held, result=None)
        store.count_duplicate(KEY)
        assert read(store).duplicates == 3

    def test_counting_a_duplicate_of_an_absent_message_does_nothing(self, store: Store) -> None:
        store.count_duplicate(KEY)
        assert store.find(KEY) is None
