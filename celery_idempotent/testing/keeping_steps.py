"""The contract of ``keep_steps``, and of how long the steps stay."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from celery_idempotent.core.records import Claim, MessageKey, RowFilter, Status
from celery_idempotent.core.store import Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import (
    KEY,
    LEASE,
    claim,
    done,
    expired_id,
    new_message,
    processing,
    read,
    same_row,
    take,
    try_claim,
    wait_until,
)

__all__ = ["StepsContract"]

STEPS = b"5 3\nfirst123"


def taken(store: Store) -> Claim:
    """Return the claim of a running message whose body has taken a step."""
    held = processing(store)
    assert store.keep_steps(held, steps=STEPS)
    return held


def released(store: Store, held: Claim) -> object:
    return store.release(held)


def retried(store: Store, held: Claim) -> object:
    return store.retry(held, new_message(attempt=1, message=b"another"))


def failed(store: Store, held: Claim) -> object:
    return store.fail(held, error="ValueError: no")


def abandoned(store: Store, held: Claim) -> object:
    store.expire(held)
    return store.abandon(read(store), error="abandoned")


def forbidden(store: Store, held: Claim) -> object:
    return store.forbid(replace(read(store), token=held.token), error="revoked")


def checkpointed(store: Store, held: Claim) -> object:
    return store.checkpoint(held, result=b"1")


def released_and_cancelled(store: Store, held: Claim) -> object:
    store.release(held)
    return store.cancel(KEY, task_id="task-1", error="revoked")


class StepsContract(StoreFixtures):
    """``keep_steps``."""

    @pytest.mark.parametrize("steps", [b"", STEPS, bytes(range(256)), b"x" * 1_000_000], ids=len)
    def test_steps_are_kept_and_nothing_else_changes(self, store: Store, steps: bytes) -> None:
        held = processing(store)
        before = read(store)
        assert before.steps is None
        assert store.keep_steps(held, steps=steps)
        assert read(store).steps == steps
        assert same_row(replace(read(store), steps=None), before)

    def test_later_steps_replace_the_earlier_ones(self, store: Store) -> None:
        held = taken(store)
        assert store.keep_steps(held, steps=b"more")
        assert store.keep_steps(held, steps=b"more")
        assert read(store).steps == b"more"

    def test_steps_need_the_claim(self, store: Store) -> None:
        held = taken(store)
        assert not store.keep_steps(Claim(KEY, held.token + 1), steps=b"late")
        assert not store.keep_steps(Claim(KEY, held.token - 1), steps=b"late")
        assert not store.keep_steps(Claim(MessageKey(KEY.message_id, "other"), held.token), steps=b"late")
        store.expire(held)
        new = take(store, read(store))
        assert not store.keep_steps(held, steps=b"late")
        assert read(store).steps == STEPS
        assert new is not None
        assert store.keep_steps(new, steps=b"new")

    def test_a_lease_that_ran_out_may_keep_steps_until_it_is_taken_over(self, store: Store) -> None:
        held = processing(store)
        store.expire(held)
        assert store.keep_steps(held, steps=STEPS)

    @pytest.mark.parametrize("end", [released, retried, failed])
    def test_a_run_that_ended_keeps_no_steps(self, store: Store, end: Callable[[Store, Claim], object]) -> None:
        held = taken(store)
        assert end(store, held)
        assert not store.keep_steps(held, steps=b"late")
        assert read(store).steps == STEPS

    @pytest.mark.parametrize(
        "then", [released, retried, failed, abandoned, forbidden, checkpointed, released_and_cancelled]
    )
    def test_steps_stay_with_the_message(self, store: Store, then: Callable[[Store, Claim], object]) -> None:
        assert then(store, taken(store))
        assert read(store).steps == STEPS

    def test_a_new_attempt_finds_them(self, store: Store) -> None:
        retried(store, taken(store))
        claim(store, new_message(attempt=1))
        assert read(store).steps == STEPS

    def test_a_failed_message_that_waits_again_has_them(self, store: Store) -> None:
        failed(store, taken(store))
        assert store.resubmit(read(store), new_message(task_id="task-2", message=b"again"))
        row = read(store)
        assert (row.status, row.steps, row.message, row.result) == (Status.PENDING, STEPS, b"again", None)

    def test_a_message_that_succeeded_has_none(self, store: Store) -> None:
        held = taken(store)
        assert store.complete(held, result=b"1")
        assert (read(store).steps, read(store).result) == (None, b"1")

    def test_a_forgotten_message_has_none(self, store: Store) -> None:
        taken(store)
        assert store.forget(read(store))
        assert read(store).steps is None

    def test_an_id_that_is_used_again_begins_without(self, store: Store) -> None:
        held = taken(store)
        store.fail(held, error="ValueError: no", unique_for=0.001)
        wait_until(lambda: read(store).expired)
        store.record(new_message(task_id="task-2"))
        assert read(store).steps is None

    def test_an_id_that_a_delivery_uses_again_begins_without(self, store: Store) -> None:
        held = taken(store)
        store.fail(held, error="ValueError: no", unique_for=0.001)
        wait_until(lambda: read(store).expired)
        try_claim(store, new_message(task_id="task-2"))
        row = read(store)
        assert (row.status, row.steps) == (Status.PROCESSING, None)

    def test_a_row_without_steps_says_so(self, store: Store) -> None:
        done(store)
        expired_id(store, key=MessageKey("another", "t"))
        assert read(store).steps is None

    def test_listings_leave_them_out(self, store: Store) -> None:
        held = taken(store)
        store.expire(held)
        listed = [
            *store.rows(RowFilter()),
            *store.find_all([KEY]),
            *store.newest(limit=10),
            *store.lapsed(again_after=0.0, limit=10),
        ]
        assert [row.key for row in listed] == [KEY] * 4
        assert [row.steps for row in listed] == [None] * 4
        assert store.renew([held], lease=LEASE) == []
        assert read(store).steps == STEPS
