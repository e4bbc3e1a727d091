"""The contract of ``record`` and ``record_all``."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, timedelta

import pytest

from celery_idempotent.core.records import Claimed, Duplicate, Inserted, MessageKey, Owner, ProcessedStatus, Row, Status
from celery_idempotent.core.store import Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import (
    KEY,
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

__all__ = ["RecordContract"]


class RecordContract(StoreFixtures):
    """``record``, ``record_all``: what is new, what is taken, what is free again."""

    # -- record --------------------------------------------------------------------------------------------------------

    def test_a_new_message_is_recorded_as_pending(self, store: Store) -> None:
        assert store.record(new_message()) == Inserted()

        row = read(store)
        assert row == Row(
            key=KEY,
            status=Status.PENDING,
            processed_status=None,
            created_timestamp=row.created_timestamp,
            processed_timestamp=None,
            task_id="task-1",
            queue="celery",
            fingerprint="a" * 64,
            attempt=0,
            token=0,
            worker=None,
            lease_expires_at=None,
            available_at=None,
            published_at=row.created_timestamp,
            expires_at=None,
            duplicates=0,
            message=b'{"args": ["o-1", 500]}',
            result=None,
            error=None,
            read_at=row.read_at,
        )

    def test_timestamps_are_aware_utc_by_one_clock(self, store: Store) -> None:
        first = pending(store)
        second = read(store)

        for moment in (first.created_timestamp, first.published_at, first.read_at):
            assert moment is not None
            assert moment.tzinfo is UTC
        assert first.created_timestamp <= first.read_at <= second.read_at

    def test_a_taken_id_is_found_with_its_row_and_nothing_is_written(self, store: Store) -> None:
        before = pending(store)

        answer = store.record(new_message(task_id="task-2", fingerprint="b" * 64, message=b"other", delay=5.0))

        assert isinstance(answer, Duplicate)
        assert same_row(answer.row, before)
        assert same_row(read(store), before)

    def test_a_running_message_is_found(self, store: Store) -> None:
        processing(store)
        answer = store.record(new_message(task_id="task-2"))
        assert isinstance(answer, Duplicate)
        assert answer.row.status is Status.PROCESSING
        assert answer.row.lease_left > 0

    def test_a_finished_message_is_found_with_its_result(self, store: Store) -> None:
        done(store)
        answer = store.record(new_message(task_id="task-2"))
        assert isinstance(answer, Duplicate)
        assert (answer.row.status, answer.row.result) == (Status.DONE, b'"receipt"')

    def test_one_message_id_may_serve_two_tasks(self, store: Store) -> None:
        pending(store)
        assert store.record(new_message(MessageKey(KEY.message_id, "shop.ship"))) == Inserted()

    def test_a_message_left_to_the_relay_is_not_published(self, store: Store) -> None:
        assert pending(store, published=False).published_at is None

    # -- record_all ----------------------------------------------------------------------------------------------------

    def test_many_messages_are_recorded_as_each_would_be(self, store: Store) -> None:
        single = pending(store)
        keys = [MessageKey(f"m{number}", "t") for number in range(1200)]  # more than fit one statement
        assert store.record_all([new_message(key) for key in keys]) == [Inserted()] * len(keys)
        for key in (keys[0], keys[-1]):
            row = read(store, key)
            changes = {"key", "created_timestamp", "published_at", "read_at"}
            for field in fields(Row):
                assert field.name in changes or getattr(row, field.name) == getattr(single, field.name)
            assert row.published_at is not None
            assert abs(row.published_at - row.created_timestamp) < timedelta(milliseconds=2)

    def test_among_many_the_ids_that_are_taken_are_found(self, store: Store) -> None:
        pending(store, key=MessageKey("pending", "t"), task_id="first")
        held = processing(store, key=MessageKey("processing", "t"))
        expired_id(store, key=MessageKey("free", "t"))
        messages = [
            new_message(MessageKey(name, "t"), task_id=f"{name}-{number}")
            for number, name in enumerate(("new", "pending", "processing", "free", "new"))
        ]

        answers = store.record_all(messages)

        assert [type(answer) for answer in answers] == [Inserted, Duplicate, Duplicate, Inserted, Duplicate]
        found = [answer.row for answer in answers if isinstance(answer, Duplicate)]
        assert [(row.key.message_id, row.task_id) for row in found] == [
            ("pending", "first"),
            ("processing", "task-1"),
            ("new", "new-0"),
        ]
        assert found[1].token == held.token
        assert (read(store, MessageKey("free", "t")).task_id, read(store, MessageKey("free", "t")).token) == (
            "free-3",
            1,
        )

    def test_no_messages_are_recorded_by_asking_for_none(self, store: Store) -> None:
        assert store.record_all([]) == []

    @pytest.mark.parametrize("delay", [0.0, 0.25, 3600.0, -3600.0, 86400.0 * 366])
    def test_a_delay_counts_from_the_recording(self, store: Store, delay: float) -> None:
        row = pending(store, delay=delay)
        assert row.available_at is not None
        assert row.available_at - row.created_timestamp == timedelta(seconds=delay)

    def test_what_may_be_missing_may_be_missing(self, store: Store) -> None:
        row = pending(store, queue=None, fingerprint=None, message=None)
        assert (row.queue, row.fingerprint, row.message) == (None, None, None)

    @pytest.mark.parametrize("message", [b"", bytes(range(256)), b"x" * 1_000_000], ids=["empty", "any byte", "large"])
    def test_a_message_is_kept_byte_for_byte(self, store: Store, message: bytes) -> None:
        assert pending(store, message=message).message == message

    @pytest.mark.parametrize(
        ("first", "second"),
        [("Order", "order"), ("a", "a "), ("a", " a"), ("a", "á"), ("\u00e9", "e\u0301"), ("ß", "ss"), ("1", "01")],
        ids=["case", "trailing blank", "leading blank", "accent", "normal form", "expansion", "number"],
    )
    def test_ids_are_compared_byte_for_byte(self, store: Store, first: str, second: str) -> None:
        pending(store, key=MessageKey(first, "t"))
        pending(store, key=MessageKey(second, "t"))
        pending(store, key=MessageKey("t", first))
        pending(store, key=MessageKey("t", second))
        assert read(store, MessageKey(second, "t")).key.message_id == second

    @pytest.mark.parametrize(
        "text", ["zażółć gęślą jaźń", "注文:壱", "🐇🥕", "a'b\"c`d\\e", "50%_off?*", "--;{}()$1:x", "line\nbreak\ttab"]
    )
    def test_ids_may_hold_any_text(self, store: Store, text: str) -> None:
        row = pending(store, key=MessageKey(text, text), task_id=text, queue=text)
        assert (row.key, row.task_id, row.queue) == (MessageKey(text, text), text, text)

    @pytest.mark.parametrize("letter", ["x", "🐇"])
    def test_ids_may_have_255_characters(self, store: Store, letter: str) -> None:
        long, longer = MessageKey(letter * 254 + "a", letter * 255), MessageKey(letter * 254 + "b", letter * 255)
        pending(store, key=long, task_id="long")
        pending(store, key=longer, task_id="longer")
        assert (read(store, long).task_id, read(store, longer).task_id) == ("long", "longer")

    # -- an id that is free again --------------------------------------------------------------------------------------

    def test_an_expired_id_starts_anew_and_keeps_only_its_token(self, store: Store) -> None:
        old = expired_id(store, delay=-5.0, attempt=3)
        store.count_duplicate(KEY)

        assert store.record(new_message(task_id="task-2", queue="q2", fingerprint="b" * 64, message=b"2")) == Inserted()

        row = read(store)
        assert row == Row(
            key=KEY,
            status=Status.PENDING,
            processed_status=None,
            created_timestamp=row.created_timestamp,
            processed_timestamp=None,
            task_id="task-2",
            queue="q2",
            fingerprint="b" * 64,
            attempt=0,
            token=old.token,
            worker=None,
            lease_expires_at=None,
            available_at=None,
            published_at=row.created_timestamp,
            expires_at=None,
            duplicates=0,
            message=b"2",
            result=None,
            error=None,
            read_at=row.read_at,
        )

    def test_a_run_of_an_expired_id_stays_fenced(self, store: Store) -> None:
        old = expired_id(store)
        store.record(new_message())
        new = claim(store)
        assert new.token > old.token
        assert not store.complete(old, result=b"late")

    def test_an_id_is_free_once_unique_for_has_passed_and_not_before(self, store: Store) -> None:
        held = processing(store)
        store.complete(held, result=None, unique_for=0.3)
        row = read(store)
        assert row.expires_at is not None
        assert row.processed_timestamp is not None
        assert row.expires_at - row.processed_timestamp == timedelta(seconds=0.3)
        answer = store.record(new_message())
        # Not free yet, unless the machine stalled for that long by the store's clock.
        assert isinstance(answer, Duplicate) or read(store).created_timestamp >= row.expires_at

        wait_until(lambda: isinstance(store.record(new_message(task_id="task-2")), Inserted) or read(store).token == 0)
        assert read(store).created_timestamp >= row.expires_at

    def test_a_finished_id_without_unique_for_stays_taken(self, store: Store) -> None:
        done(store)
        assert read(store).expires_at is None
        assert isinstance(store.record(new_message()), Duplicate)

    # -- what a row answers ---------------------------------------------------------------------------------------------

    def test_an_owner_by_name_does_not_own_what_it_has_not_claimed(self, store: Store) -> None:
        before = pending(store)
        owner = Owner(KEY, WORKER)
        assert not store.fail(owner, error="x")
        assert not store.release(owner)
        assert not store.expire(owner)
        assert not store.retry(owner, new_message(attempt=1))
        assert same_row(read(store), before)
        assert isinstance(try_claim(store), Claimed)

    def test_the_outcome_of_a_failed_message_is_found(self, store: Store) -> None:
        store.fail(processing(store), error="ValueError: no")
        answer = store.record(new_message())
        assert isinstance(answer, Duplicate)
        assert (answer.row.processed_status, answer.row.error) == (ProcessedStatus.FAILURE, "ValueError: no")
