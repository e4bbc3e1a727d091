"""The contract of ``retry``, ``release``, ``cancel`` and ``forbid``."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from datetime import timedelta

import pytest

from celery_idempotent.core.records import Claim, MessageKey, NotClaimed, Owner, ProcessedStatus, Status
from celery_idempotent.core.store import Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import (
    KEY,
    LEASE,
    WORKER,
    claim,
    done,
    new_message,
    pending,
    processing,
    read,
    same_row,
    try_claim,
)

__all__ = ["HandingOnContract"]

BY = pytest.mark.parametrize("by_worker", [False, True], ids=["by claim", "by worker"])


class HandingOnContract(StoreFixtures):
    """``retry``, ``release``, ``cancel``, ``forbid``."""

    # -- retry ---------------------------------------------------------------------------------------------------------

    @BY
    def test_a_retried_message_waits_for_its_next_attempt(self, store: Store, by_worker: bool) -> None:
        held = processing(store)
        first = read(store)
        next_one = new_message(
            attempt=1, delay=60.0, queue="slow", fingerprint="b" * 64, message=b"next", task_id="other"
        )

        assert store.retry(Owner(KEY, WORKER) if by_worker else held, next_one)

        row = read(store)
        assert (row.status, row.processed_status, row.attempt, row.token) == (Status.PENDING, None, 1, held.token)
        assert (row.queue, row.fingerprint, row.message) == ("slow", "b" * 64, b"next")
        assert (row.lease_expires_at, row.result, row.processed_timestamp) == (None, None, None)
        assert (row.task_id, row.created_timestamp) == (first.task_id, first.created_timestamp)
        assert row.published_at is not None
        assert row.available_at == row.published_at + timedelta(seconds=60)
        assert isinstance(try_claim(store, new_message(attempt=0, fingerprint=None)), NotClaimed)
        assert claim(store, new_message(attempt=1, fingerprint=None)).token == held.token + 1

    def test_what_a_retry_replaces_it_replaces_with_nothing_too(self, store: Store) -> None:
        held = processing(store, delay=5.0)
        assert store.retry(held, new_message(attempt=1, queue=None, fingerprint=None, message=None, published=False))
        row = read(store)
        assert (row.queue, row.fingerprint, row.message) == (None, None, None)
        assert (row.available_at, row.published_at) == (None, None)

    def test_a_run_that_handed_over_can_write_nothing_more(self, store: Store) -> None:
        held = processing(store)
        store.retry(held, new_message(attempt=1))
        before = read(store)
        assert not store.retry(held, new_message(attempt=2))
        assert not store.retry(Owner(KEY, WORKER), new_message(attempt=2))
        assert not store.complete(held, result=b"late")
        assert not store.fail(held, error="late")
        assert not store.release(held)
        assert same_row(read(store), before)

    def test_only_its_holder_retries_a_message(self, store: Store) -> None:
        held = processing(store)
        assert not store.retry(Claim(KEY, held.token + 1), new_message(attempt=1))
        assert not store.retry(Owner(KEY, "host-z:1"), new_message(attempt=1))
        assert read(store).status is Status.PROCESSING

    # -- release -------------------------------------------------------------------------------------------------------

    @BY
    def test_a_released_message_is_pending_as_it_was(self, store: Store, by_worker: bool) -> None:
        held = processing(store, attempt=2)
        before = read(store)

        assert store.release(Owner(KEY, WORKER) if by_worker else held)

        row = read(store)
        assert (row.status, row.attempt, row.token, row.lease_expires_at) == (Status.PENDING, 2, held.token, None)
        assert (row.message, row.queue, row.fingerprint, row.task_id) == (
            before.message,
            before.queue,
            before.fingerprint,
            before.task_id,
        )
        assert claim(store, new_message(attempt=2)).token == held.token + 1

    def test_a_released_message_waits_since_its_release(self, store: Store) -> None:
        held = processing(store)
        before = read(store)
        store.release(held)
        assert read(store).waiting_since >= before.read_at

    def test_a_message_is_released_once(self, store: Store) -> None:
        held = processing(store)
        assert store.release(held)
        assert not store.release(held)
        assert not store.release(Owner(KEY, WORKER))

    def test_a_recovery_point_is_not_handed_on_by_worker(self, store: Store) -> None:
        held = processing(store)
        store.checkpoint(held, result=b"result")
        assert not store.release(Owner(KEY, WORKER))
        assert not store.retry(Owner(KEY, WORKER), new_message(attempt=1))
        row = read(store)
        assert (row.status, row.processed_status, row.result) == (Status.PROCESSING, ProcessedStatus.SUCCESS, b"result")

    def test_a_finished_message_is_not_released(self, store: Store) -> None:
        held = done(store)
        assert not store.release(held)
        assert not store.release(Owner(KEY, WORKER))
        assert read(store).status is Status.DONE

    # -- cancel --------------------------------------------------------------------------------------------------------

    def test_a_pending_message_is_cancelled(self, store: Store) -> None:
        before = pending(store, delay=3600.0)

        assert store.cancel(KEY, task_id="task-1", error="TaskRevokedError: revoked", unique_for=3600.0)

        row = read(store)
        assert (row.status, row.processed_status) == (Status.DONE, ProcessedStatus.FAILURE)
        assert (row.error, row.message) == ("TaskRevokedError: revoked", before.message)
        assert row.processed_timestamp is not None
        assert row.expires_at == row.processed_timestamp + timedelta(hours=1)
        assert isinstance(try_claim(store), NotClaimed)

    def test_a_message_that_waits_for_its_retry_is_cancelled(self, store: Store) -> None:
        store.retry(processing(store), new_message(attempt=1, delay=3600.0))
        assert store.cancel(KEY, task_id="task-1", error="revoked")

    @pytest.mark.parametrize("task_id", ["task-2", "TASK-1", "task-1 "])
    def test_a_message_of_another_task_id_is_not_cancelled(self, store: Store, task_id: str) -> None:
        pending(store)
        assert not store.cancel(KEY, task_id=task_id, error="revoked")
        assert read(store).status is Status.PENDING

    def test_a_message_that_runs_or_ran_is_not_cancelled(self, store: Store) -> None:
        held = processing(store)
        assert not store.cancel(KEY, task_id="task-1", error="revoked")
        store.complete(held, result=b"1")
        assert not store.cancel(KEY, task_id="task-1", error="revoked")
        assert read(store).processed_status is ProcessedStatus.SUCCESS

    def test_an_absent_message_is_not_cancelled(self, store: Store) -> None:
        assert not store.cancel(MessageKey("absent", "t"), task_id="task-1", error="revoked")

    # -- forbid --------------------------------------------------------------------------------------------------------

    def test_a_running_message_notes_that_it_is_not_to_run_again(self, store: Store) -> None:
        held = processing(store)
        before = read(store)
        assert store.forbid(before, error="revoked")
        row = read(store)
        assert (row.status, row.error, row.forbidden) == (Status.PROCESSING, "revoked", True)
        assert (row.token, row.worker, row.lease_expires_at) == (before.token, before.worker, before.lease_expires_at)
        assert store.complete(held, result=b"1")
        assert read(store).error is None

    def test_what_runs_no_more_is_not_noted(self, store: Store) -> None:
        held = processing(store)
        before = read(store)
        store.checkpoint(held, result=b"1")
        assert not store.forbid(before, error="revoked")
        store.complete(held, result=b"1")
        assert not store.forbid(before, error="revoked")
        assert read(store).error is None

    def test_what_runs_for_another_is_not_noted(self, store: Store) -> None:
        held = processing(store)
        before = read(store)
        store.expire(held)
        assert store.take_over(read(store), task_id="task-2", worker="b", lease=LEASE, attempt=0)
        assert not store.forbid(before, error="revoked")
        assert read(store).error is None
