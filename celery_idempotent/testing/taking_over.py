"""The contract of ``take_over``, ``renew``, ``expire`` and ``abandon``: who holds a message when leases run out."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from datetime import timedelta

import pytest

from celery_idempotent.core.records import Claim, MessageKey, Owner, ProcessedStatus, Row, Status
from celery_idempotent.core.store import Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import (
    KEY,
    LEASE,
    WORKER,
    claim,
    done,
    pending,
    processing,
    read,
    same_row,
    take,
    wait_until,
)

__all__ = ["TakeOverContract"]


def overdue(store: Store) -> tuple[Claim, Row]:
    """Return a claim whose lease ran out, and the row as another process reads it."""
    held = processing(store)
    assert store.expire(held)
    return held, read(store)


class TakeOverContract(StoreFixtures):
    """``take_over``, ``renew``, ``expire``, ``abandon``."""

    # -- take_over -----------------------------------------------------------------------------------------------------

    def test_a_lease_runs_out_by_itself_and_the_message_is_taken_over(self, store: Store) -> None:
        pending(store)
        held = claim(store, lease=0.05)
        wait_until(lambda: read(store).lease_left <= 0)

        assert take(store, read(store)) == Claim(KEY, held.token + 1)

        row = read(store)
        assert (row.status, row.worker, row.token) == (Status.PROCESSING, "host-b:202", held.token + 1)
        assert (row.task_id, row.ran_task_id) == ("task-1", "task-2")
        assert LEASE - 10 < row.lease_left <= LEASE

    def test_a_live_lease_is_not_taken_over(self, store: Store) -> None:
        processing(store)
        before = read(store)
        assert take(store, before) is None
        assert same_row(read(store), before)

    def test_of_two_takeovers_one_succeeds(self, store: Store) -> None:
        _, row = overdue(store)
        assert take(store, row) is not None
        assert take(store, row, worker="host-c:303") is None
        assert read(store).worker == "host-b:202"

    def test_a_lease_renewed_since_is_not_taken_over(self, store: Store) -> None:
        held, row = overdue(store)
        assert store.renew([held], lease=LEASE) == []
        assert take(store, row) is None

    def test_a_message_that_ended_since_is_not_taken_over(self, store: Store) -> None:
        held, row = overdue(store)
        store.complete(held, result=b"1")
        assert take(store, row) is None
        assert read(store).status is Status.DONE

    def test_a_recovery_point_written_since_is_seen_before_the_takeover(self, store: Store) -> None:
        # By the row, the new owner decides whether to run the body or replay its result.
        held, row = overdue(store)
        store.checkpoint(held, result=b"1")
        assert take(store, row) is None
        assert take(store, read(store)) is not None

    def test_a_recovery_point_is_taken_over_with_its_result(self, store: Store) -> None:
        held = processing(store)
        store.checkpoint(held, result=b"1")
        store.expire(held)

        new = take(store, read(store))

        assert new is not None
        row = read(store)
        assert (row.processed_status, row.result) == (ProcessedStatus.SUCCESS, b"1")
        assert store.complete(new, result=None)
        assert read(store).result == b"1"

    @pytest.mark.parametrize(("retries", "kept"), [(0, 1), (1, 1), (4, 4)])
    def test_the_greater_attempt_is_kept(self, store: Store, retries: int, kept: int) -> None:
        held = processing(store, attempt=1)
        store.expire(held)
        assert take(store, read(store), attempt=retries) is not None
        assert read(store).attempt == kept

    def test_takeovers_are_counted_until_the_next_attempt(self, store: Store) -> None:
        held = processing(store)
        counted = [read(store).takeovers]
        for _ in range(2):
            store.expire(held)
            held = take(store, read(store)) or held
            counted.append(read(store).takeovers)
        store.release(held)
        counted.append(read(store).takeovers)
        claim(store)
        counted.append(read(store).takeovers)
        assert counted == [0, 1, 2, 2, 0]

    # -- fencing -------------------------------------------------------------------------------------------------------

    def test_after_a_takeover_the_old_owner_can_write_nothing(self, store: Store) -> None:
        old, row = overdue(store)
        assert take(store, row) is not None
        before = read(store)

        assert not store.keep_steps(old, steps=b"late")
        assert not store.checkpoint(old, result=b"late")
        assert not store.complete(old, result=b"late")
        assert not store.fail(old, error="late")
        assert not store.release(old)
        assert not store.expire(old)
        assert not store.fail(Owner(KEY, WORKER), error="late")
        assert not store.release(Owner(KEY, WORKER))
        assert not store.expire(Owner(KEY, WORKER))
        assert store.renew([old], lease=LEASE) == [old]

        assert same_row(read(store), before)

    # -- renew ---------------------------------------------------------------------------------------------------------

    def test_a_renewed_lease_counts_from_now(self, store: Store) -> None:
        held = processing(store)
        before = read(store)
        assert store.renew([held], lease=600.0) == []
        row = read(store)
        assert row.lease_expires_at is not None
        assert before.read_at <= row.lease_expires_at - timedelta(seconds=600) <= row.read_at
        assert (row.token, row.worker, row.status) == (before.token, before.worker, before.status)

    def test_a_longer_lease_stays_as_it_is(self, store: Store) -> None:
        held = processing(store)
        before = read(store)
        assert store.renew([held, Owner(KEY, WORKER)], lease=LEASE / 2) == []
        assert store.renew([Claim(KEY, held.token + 1), Owner(KEY, "host-z:1")], lease=LEASE / 2) != []
        assert same_row(read(store), before)

    def test_nothing_to_renew_is_nothing_lost(self, store: Store) -> None:
        assert store.renew([], lease=LEASE) == []

    def test_a_lease_that_ran_out_unnoticed_is_renewed(self, store: Store) -> None:
        held, _ = overdue(store)
        assert store.renew([held], lease=LEASE) == []
        assert read(store).lease_left > 0

    def test_a_recovery_point_is_renewed(self, store: Store) -> None:
        held = processing(store)
        store.checkpoint(held, result=None)
        assert store.renew([held], lease=LEASE) == []

    def test_exactly_the_lost_claims_are_reported(self, store: Store) -> None:
        keys = {name: MessageKey(name, "t") for name in ("held", "ended", "taken", "released", "absent", "also held")}
        claims = {name: processing(store, key=key) for name, key in keys.items() if name != "absent"}
        claims["absent"] = Claim(keys["absent"], 1)
        store.complete(claims["ended"], result=None)
        store.expire(claims["taken"])
        assert take(store, read(store, keys["taken"])) is not None
        store.release(claims["released"])

        lost = store.renew(list(claims.values()), lease=600.0)

        assert set(lost) == {claims[name] for name in ("ended", "taken", "released", "absent")}
        assert read(store, keys["held"]).lease_left > LEASE
        assert read(store, keys["also held"]).lease_left > LEASE
        assert read(store, keys["taken"]).lease_left <= LEASE

    def test_a_lease_is_renewed_by_its_worker(self, store: Store) -> None:
        held = processing(store)
        owner, stranger = Owner(KEY, WORKER), Owner(KEY, "host-z:1")
        assert store.renew([stranger, owner], lease=600.0) == [stranger]
        assert read(store).lease_left > LEASE
        store.complete(held, result=None)
        assert store.renew([owner], lease=600.0) == [owner]

    def test_many_claims_are_renewed_at_once(self, store: Store) -> None:
        claims = [processing(store, key=MessageKey(f"m{number:02}", "t")) for number in range(40)]
        assert store.renew(list(reversed(claims)), lease=600.0) == []
        assert all(read(store, held.key).lease_left > LEASE for held in claims)

    # -- expire --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("by_worker", [False, True], ids=["by claim", "by worker"])
    def test_an_owner_known_to_be_dead_loses_its_lease_at_once(self, store: Store, by_worker: bool) -> None:
        held = processing(store)
        assert store.expire(Owner(KEY, WORKER) if by_worker else held)
        row = read(store)
        assert (row.status, row.token, row.lease_left <= 0) == (Status.PROCESSING, held.token, True)
        assert take(store, row) is not None

    def test_a_lease_of_another_worker_is_not_expired(self, store: Store) -> None:
        processing(store)
        assert not store.expire(Owner(KEY, WORKER.upper()))
        assert read(store).lease_left > 0

    def test_what_is_not_running_has_no_lease_to_expire(self, store: Store) -> None:
        held = done(store)
        assert not store.expire(held)
        assert not store.expire(Owner(KEY, WORKER))
        assert not store.expire(Claim(MessageKey("absent", "t"), 1))

    # -- abandon -------------------------------------------------------------------------------------------------------

    def test_an_overdue_message_is_abandoned(self, store: Store) -> None:
        held, row = overdue(store)

        assert store.abandon(row, error="abandoned", unique_for=3600.0)

        ended = read(store)
        assert (ended.status, ended.processed_status, ended.error) == (
            Status.DONE,
            ProcessedStatus.FAILURE,
            "abandoned",
        )
        assert ended.message == row.message
        assert ended.lease_expires_at is None
        assert ended.processed_timestamp is not None
        assert ended.expires_at == ended.processed_timestamp + timedelta(hours=1)
        assert not store.complete(held, result=b"late")
        assert not store.fail(held, error="ValueError: late")
        assert read(store).error == "abandoned"

    def test_a_live_message_is_not_abandoned(self, store: Store) -> None:
        processing(store)
        assert not store.abandon(read(store), error="abandoned")
        assert read(store).status is Status.PROCESSING

    def test_a_message_renewed_or_taken_over_since_is_not_abandoned(self, store: Store) -> None:
        held, row = overdue(store)
        store.renew([held], lease=LEASE)
        assert not store.abandon(row, error="abandoned")
        store.expire(held)
        new = take(store, read(store))
        assert new is not None
        store.expire(new)
        assert not store.abandon(row, error="abandoned")

    def test_a_recovery_point_written_since_is_not_abandoned(self, store: Store) -> None:
        held, row = overdue(store)
        store.checkpoint(held, result=b"1")
        assert not store.abandon(row, error="abandoned")
        assert read(store).result == b"1"
