"""The contract of ``claim``."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from celery_idempotent.core.records import Claim, Claimed, MessageKey, NewMessage, NotClaimed, Row, Status
from celery_idempotent.core.store import Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import (
    GRACE,
    KEY,
    LEASE,
    WORKER,
    claim,
    done,
    expired_id,
    new_message,
    pending,
    processing,
    read,
    same_row,
    try_claim,
    wait_until,
)

__all__ = ["ClaimContract"]


def never() -> NewMessage:
    """Return an ``adopt`` that must not be called."""
    raise AssertionError("a message that has a row is not adopted")


class ClaimContract(StoreFixtures):
    """``claim``: what may run, and which rows prevent it."""

    def test_a_pending_message_is_claimed(self, store: Store) -> None:
        before = pending(store)

        answer = store.claim(new_message(), worker=WORKER, lease=LEASE, grace=GRACE, adopt=never)

        assert answer == Claimed(Claim(KEY, 1))
        row = read(store)
        assert (row.status, row.worker, row.token, row.attempt) == (Status.PROCESSING, WORKER, 1, 0)
        assert LEASE - 10 < row.lease_left <= LEASE
        assert (row.processed_status, row.processed_timestamp, row.error, row.result) == (None, None, None, None)
        assert (row.task_id, row.message, row.created_timestamp, row.published_at) == (
            before.task_id,
            before.message,
            before.created_timestamp,
            before.published_at,
        )

    def test_a_claimed_message_is_taken(self, store: Store) -> None:
        processing(store)
        before = read(store)
        answer = try_claim(store, worker="host-b:202")
        assert isinstance(answer, NotClaimed)
        assert same_row(answer.row, before)
        assert same_row(read(store), before)

    def test_even_its_owner_does_not_claim_a_message_twice(self, store: Store) -> None:
        processing(store)
        assert isinstance(try_claim(store), NotClaimed)

    def test_a_message_whose_lease_ran_out_is_taken_over_and_not_claimed(self, store: Store) -> None:
        store.expire(processing(store))
        answer = try_claim(store, worker="host-b:202")
        assert isinstance(answer, NotClaimed)
        assert answer.row.lease_left <= 0

    def test_a_finished_message_is_taken(self, store: Store) -> None:
        done(store)
        answer = try_claim(store)
        assert isinstance(answer, NotClaimed)
        assert (answer.row.status, answer.row.result) == (Status.DONE, b'"receipt"')

    def test_a_claim_notes_whose_delivery_runs(self, store: Store) -> None:
        pending(store)
        claim(store, new_message(task_id="task-2"))
        assert (read(store).task_id, read(store).ran_task_id) == ("task-1", "task-2")

    def test_every_claim_has_a_greater_token(self, store: Store) -> None:
        held = processing(store)
        tokens = [held.token]
        for _ in range(3):
            store.release(held)
            held = claim(store)
            tokens.append(held.token)
        assert tokens == [1, 2, 3, 4]

    def test_a_worker_label_may_have_255_characters(self, store: Store) -> None:
        pending(store)
        claim(store, worker="w" * 255)
        assert read(store).worker == "w" * 255

    @pytest.mark.parametrize("lease", [0.5, 60.0, 86400.0])
    def test_a_lease_counts_from_the_claim(self, store: Store, lease: float) -> None:
        before = pending(store)
        claim(store, lease=lease)
        row = read(store)
        assert row.lease_expires_at is not None
        assert before is not None
        assert (
            before.read_at + timedelta(seconds=lease) <= row.lease_expires_at <= row.read_at + timedelta(seconds=lease)
        )

    # -- absent --------------------------------------------------------------------------------------------------------

    def test_an_absent_message_is_inserted_as_claimed(self, store: Store) -> None:
        assert try_claim(store, new_message(attempt=2)) == Claimed(Claim(KEY, 1))

        row = read(store)
        assert row == Row(
            key=KEY,
            status=Status.PROCESSING,
            processed_status=None,
            created_timestamp=row.created_timestamp,
            processed_timestamp=None,
            task_id="task-1",
            queue="celery",
            fingerprint="a" * 64,
            attempt=2,
            token=1,
            worker=WORKER,
            lease_expires_at=row.created_timestamp + timedelta(seconds=LEASE),
            available_at=None,
            published_at=row.created_timestamp,
            expires_at=None,
            duplicates=0,
            message=b'{"args": ["o-1", 500]}',
            result=None,
            error=None,
            read_at=row.read_at,
            ran_task_id="task-1",
        )

    def test_an_absent_message_is_adopted_as_it_is_told(self, store: Store) -> None:
        bare = NewMessage(KEY, "task-1")
        whole = new_message(queue="adopted", message=b"whole", delay=5.0)

        answer = store.claim(bare, worker=WORKER, lease=LEASE, grace=GRACE, adopt=lambda: whole)

        assert isinstance(answer, Claimed)
        row = read(store)
        assert (row.queue, row.message, row.available_at) == ("adopted", b"whole", None)

    def test_an_expired_id_is_claimed_anew_whatever_its_fingerprint_was(self, store: Store) -> None:
        old = expired_id(store)
        store.count_duplicate(KEY)
        message = new_message(task_id="task-2", fingerprint="b" * 64, message=None)

        answer = store.claim(
            message,
            worker=WORKER,
            lease=LEASE,
            grace=GRACE,
            adopt=lambda: new_message(task_id="task-2", fingerprint="b" * 64, message=b"whole"),
        )

        assert answer == Claimed(Claim(KEY, old.token + 1))
        row = read(store)
        assert (row.task_id, row.fingerprint, row.message) == ("task-2", "b" * 64, b"whole")
        assert (row.result, row.processed_status, row.processed_timestamp, row.expires_at) == (None, None, None, None)
        assert row.duplicates == 0
        assert not store.complete(old, result=b"late")

    @pytest.mark.parametrize(
        "delivery",
        [
            {"task_id": "task-1"},
            {"task_id": "task-3", "original_task_id": "task-1"},
            {"task_id": "task-3", "original_task_id": "task-2"},
            {"task_id": "task-2"},
        ],
        ids=["the first", "a copy of the first", "a copy of a copy", "the one that ran"],
    )
    def test_an_old_copy_is_not_claimed_once_the_id_is_free(self, store: Store, delivery: dict[str, Any]) -> None:
        pending(store)
        ran = claim(store, new_message(task_id="task-2"))
        assert store.complete(ran, result=b"1", unique_for=0.001)
        wait_until(lambda: read(store).expired)

        answer = try_claim(store, new_message(message=None, **delivery))

        assert isinstance(answer, NotClaimed)
        assert (answer.row.status, answer.row.task_id, answer.row.ran_task_id) == (Status.DONE, "task-1", "task-2")
        assert isinstance(try_claim(store, new_message(task_id="task-4")), Claimed)

    def test_a_call_under_a_free_id_may_have_the_same_task_id(self, store: Store) -> None:
        expired_id(store)
        pending(store)
        claim(store)

    # -- attempts ------------------------------------------------------------------------------------------------------

    def test_an_old_copy_of_a_retried_message_is_not_claimed(self, store: Store) -> None:
        pending(store, attempt=2)
        answer = try_claim(store, new_message(attempt=1))
        assert isinstance(answer, NotClaimed)
        assert answer.row.status is Status.PENDING

    @pytest.mark.parametrize("retries", [2, 3])
    def test_a_claim_keeps_the_greater_number_of_retries(self, store: Store, retries: int) -> None:
        pending(store, attempt=2)
        claim(store, new_message(attempt=retries))
        assert read(store).attempt == retries

    def test_a_delivery_with_enough_retries_may_come_early(self, store: Store) -> None:
        pending(store, attempt=1, delay=3600.0)
        claim(store, new_message(attempt=1))
        assert read(store).available_at is None

    def test_an_old_copy_runs_once_the_retry_is_overdue_by_the_grace(self, store: Store) -> None:
        pending(store, attempt=2, delay=-GRACE - 1)
        claim(store, new_message(attempt=0))
        assert (read(store).attempt, read(store).available_at) == (2, None)

    def test_an_old_copy_does_not_run_within_the_grace(self, store: Store) -> None:
        pending(store, attempt=2, delay=-GRACE + 20)
        assert isinstance(try_claim(store, new_message(attempt=0)), NotClaimed)

    def test_no_grace_lets_an_old_copy_run_at_once(self, store: Store) -> None:
        pending(store, attempt=2, delay=0.0)
        assert isinstance(store.claim(new_message(attempt=0), worker=WORKER, lease=LEASE, grace=0.0), Claimed)

    # -- fingerprints --------------------------------------------------------------------------------------------------

    def test_a_message_with_other_arguments_is_not_claimed(self, store: Store) -> None:
        pending(store, delay=-2 * GRACE)
        answer = try_claim(store, new_message(fingerprint="b" * 64))
        assert isinstance(answer, NotClaimed)
        assert answer.row.status is Status.PENDING

    @pytest.mark.parametrize(("recorded", "delivered"), [(None, "a" * 64), ("a" * 64, None), (None, None)])
    def test_arguments_that_are_not_known_are_not_compared(
        self, store: Store, recorded: str | None, delivered: str | None
    ) -> None:
        pending(store, fingerprint=recorded)
        claim(store, new_message(fingerprint=delivered))
        assert read(store).fingerprint == recorded

    # -- what a claim clears -------------------------------------------------------------------------------------------

    def test_a_claim_starts_from_a_clean_row(self, store: Store) -> None:
        held = processing(store)
        store.checkpoint(held, result=b"1")
        store.release(held)
        claim(store)
        row = read(store)
        assert (row.processed_status, row.error, row.result, row.available_at) == (None, None, None, None)

    def test_claims_of_different_messages_do_not_mix(self, store: Store) -> None:
        first, second = MessageKey("1", "t"), MessageKey("2", "t")
        pending(store, key=first)
        pending(store, key=second)
        claim(store, new_message(first))
        assert read(store, second).status is Status.PENDING
