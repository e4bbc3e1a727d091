"""The contract of ``checkpoint``, ``complete`` and ``fail``."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from datetime import timedelta

import pytest

from celery_idempotent.core.records import Claim, MessageKey, NoResultReason, Owner, ProcessedStatus, Status
from celery_idempotent.core.store import Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import KEY, LEASE, WORKER, claim, done, pending, processing, read, same_row

__all__ = ["EndingContract"]

RESULTS = pytest.mark.parametrize(
    "result",
    [b"", b"null", b"0", bytes(range(256)), b"x" * 1_000_000],
    ids=["empty", "null", "zero", "any byte", "large"],
)


class EndingContract(StoreFixtures):
    """``checkpoint``, ``complete``, ``fail``."""

    # -- checkpoint ----------------------------------------------------------------------------------------------------

    @RESULTS
    def test_a_recovery_point_keeps_the_result_and_the_claim(self, store: Store, result: bytes) -> None:
        held = processing(store)
        before = read(store)
        assert store.checkpoint(held, result=result)
        row = read(store)
        assert (row.status, row.processed_status, row.result) == (Status.PROCESSING, ProcessedStatus.SUCCESS, result)
        assert (row.token, row.worker, row.lease_expires_at) == (before.token, before.worker, before.lease_expires_at)
        assert row.processed_timestamp is None
        assert row.message == before.message

    def test_a_recovery_point_may_come_with_a_new_lease(self, store: Store) -> None:
        held = processing(store)
        store.expire(held)
        assert store.checkpoint(held, result=b"1", lease=LEASE)
        row = read(store)
        assert 0 < row.lease_left <= LEASE
        assert (row.processed_status, row.result, row.token) == (ProcessedStatus.SUCCESS, b"1", held.token)

    def test_a_recovery_point_may_have_no_result(self, store: Store) -> None:
        held = processing(store)
        assert store.checkpoint(held, result=None)
        assert (read(store).processed_status, read(store).result) == (ProcessedStatus.SUCCESS, None)

    def test_a_recovery_point_may_be_written_again(self, store: Store) -> None:
        held = processing(store)
        assert store.checkpoint(held, result=b"1")
        assert store.checkpoint(held, result=b"1")
        assert read(store).result == b"1"

    def test_a_recovery_point_needs_the_claim(self, store: Store) -> None:
        held = processing(store)
        assert not store.checkpoint(Claim(KEY, held.token + 1), result=b"1")
        assert not store.checkpoint(Claim(MessageKey(KEY.message_id, "other"), held.token), result=b"1")
        store.complete(held, result=b"2")
        assert not store.checkpoint(held, result=b"3")
        assert read(store).result == b"2"

    # -- complete ------------------------------------------------------------------------------------------------------

    @RESULTS
    def test_a_completed_message_is_done_with_its_result(self, store: Store, result: bytes) -> None:
        held = processing(store)
        assert store.complete(held, result=result)
        row = read(store)
        assert (row.status, row.processed_status, row.result) == (Status.DONE, ProcessedStatus.SUCCESS, result)
        assert (row.message, row.error, row.lease_expires_at, row.expires_at) == (None, None, None, None)
        assert row.processed_timestamp is not None
        assert row.created_timestamp <= row.processed_timestamp <= row.read_at
        assert row.token == held.token

    def test_a_message_may_complete_without_a_result(self, store: Store) -> None:
        assert store.complete(processing(store), result=None, note=NoResultReason.IGNORED)
        assert (read(store).result, read(store).error) == (None, "ignored")

    @pytest.mark.parametrize("kept", [b"", b"1"])
    def test_no_result_keeps_that_of_the_recovery_point(self, store: Store, kept: bytes) -> None:
        held = processing(store)
        store.checkpoint(held, result=kept)
        assert store.complete(held, result=None)
        assert read(store).result == kept

    def test_a_result_replaces_that_of_the_recovery_point(self, store: Store) -> None:
        held = processing(store)
        store.checkpoint(held, result=b"1")
        assert store.complete(held, result=b"")
        assert read(store).result == b""

    def test_unique_for_counts_from_the_completion(self, store: Store) -> None:
        store.complete(processing(store), result=None, unique_for=3600.0)
        row = read(store)
        assert row.processed_timestamp is not None
        assert row.expires_at == row.processed_timestamp + timedelta(hours=1)
        assert not row.expired

    def test_a_completion_that_was_written_may_be_repeated(self, store: Store) -> None:
        held = done(store)
        before = read(store)
        assert store.complete(held, result=b'"receipt"')
        assert same_row(read(store), before)

    def test_a_completion_after_the_lease_ran_out_counts_if_nobody_took_over(self, store: Store) -> None:
        held = processing(store)
        store.expire(held)
        assert store.complete(held, result=b"1")

    @pytest.mark.parametrize("token", [0, 2])
    def test_another_token_completes_nothing(self, store: Store, token: int) -> None:
        processing(store)
        before = read(store)
        assert not store.complete(Claim(KEY, token), result=b"1")
        assert same_row(read(store), before)

    def test_a_failed_message_does_not_complete(self, store: Store) -> None:
        held = processing(store)
        store.fail(held, error="ValueError: no")
        assert not store.complete(held, result=b"1")
        assert read(store).processed_status is ProcessedStatus.FAILURE

    def test_a_message_handed_on_does_not_complete(self, store: Store) -> None:
        held = processing(store)
        store.release(held)
        assert not store.complete(held, result=b"1")
        again = claim(store)
        assert not store.complete(held, result=b"1")
        assert store.complete(again, result=b"2")
        assert not store.complete(held, result=b"1")
        assert read(store).result == b"2"

    def test_an_absent_message_does_not_complete(self, store: Store) -> None:
        assert not store.complete(Claim(KEY, 1), result=b"1")
        assert store.find(KEY) is None

    # -- fail ----------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("by_worker", [False, True], ids=["by claim", "by worker"])
    def test_a_failed_message_is_done_and_keeps_its_message(self, store: Store, by_worker: bool) -> None:
        held = processing(store)
        before = read(store)

        assert store.fail(Owner(KEY, WORKER) if by_worker else held, error="ValueError: no", unique_for=3600.0)

        row = read(store)
        assert (row.status, row.processed_status, row.error) == (Status.DONE, ProcessedStatus.FAILURE, "ValueError: no")
        assert (row.message, row.result, row.lease_expires_at) == (before.message, None, None)
        assert row.processed_timestamp is not None
        assert row.expires_at == row.processed_timestamp + timedelta(hours=1)

    @pytest.mark.parametrize(
        "error",
        ["", "ValueError: zażółć 🐇", "E: nul \0 byte", "E: surrogate \udcff", "E: " + "x" * 100_000],
        ids=["empty", "unicode", "nul", "surrogate", "long"],
    )
    def test_no_error_text_keeps_a_failure_from_being_written(self, store: Store, error: str) -> None:
        held = processing(store)
        assert store.fail(held, error=error)
        assert store.fail(held, error=error)
        row = read(store)
        assert row.processed_status is ProcessedStatus.FAILURE
        assert row.error is not None
        assert row.error[:2] == error[:2]

    def test_a_failure_that_was_written_may_be_repeated_by_its_claim(self, store: Store) -> None:
        held = processing(store)
        assert store.fail(held, error="ValueError: no")
        before = read(store)
        assert store.fail(held, error="ValueError: no")
        assert same_row(read(store), before)

    def test_by_worker_only_a_running_message_fails(self, store: Store) -> None:
        owner = Owner(KEY, WORKER)
        assert not store.fail(owner, error="WorkerLostError")
        processing(store)
        assert store.fail(owner, error="WorkerLostError")
        assert not store.fail(owner, error="WorkerLostError")

    def test_a_recovery_point_does_not_fail_by_worker(self, store: Store) -> None:
        """A parent that finds its process dead does not know that the body had ended."""
        held = processing(store)
        store.checkpoint(held, result=b"result")
        assert not store.fail(Owner(KEY, WORKER), error="WorkerLostError")
        row = read(store)
        assert (row.status, row.processed_status, row.result) == (Status.PROCESSING, ProcessedStatus.SUCCESS, b"result")
        assert store.fail(held, error="its result cannot be stored")

    def test_a_message_of_another_worker_does_not_fail(self, store: Store) -> None:
        processing(store)
        assert not store.fail(Owner(KEY, WORKER + " "), error="WorkerLostError")
        assert read(store).status is Status.PROCESSING

    def test_a_completed_message_does_not_fail(self, store: Store) -> None:
        held = done(store)
        assert not store.fail(held, error="late")
        assert not store.fail(Owner(KEY, WORKER), error="late")
        assert read(store).processed_status is ProcessedStatus.SUCCESS

    def test_another_token_fails_nothing(self, store: Store) -> None:
        held = processing(store)
        assert not store.fail(Claim(KEY, held.token + 1), error="late")
        assert read(store).status is Status.PROCESSING

    def test_a_pending_message_neither_completes_nor_fails(self, store: Store) -> None:
        before = pending(store)
        assert not store.complete(Claim(KEY, before.token), result=None)
        assert not store.fail(Claim(KEY, before.token), error="late")
        assert store.renew([Claim(KEY, before.token)], lease=LEASE) == [Claim(KEY, before.token)]
        assert same_row(read(store), before)
