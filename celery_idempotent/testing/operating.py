"""The contract of what operators read, and of a store's life."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from collections.abc import Callable

from celery_idempotent.records import MessageKey, ProcessedStatus, RowFilter, Status, TaskCount
from celery_idempotent.store import Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import KEY, claim, done, pending, processing, read, wait_until

__all__ = ["OperatorContract"]


class OperatorContract(StoreFixtures):
    """``find``, ``rows``, ``counts``; ``init``, ``check``, ``close``."""

    def test_an_absent_message_is_not_found(self, store: Store) -> None:
        assert store.find(KEY) is None

    # -- rows ----------------------------------------------------------------------------------------------------------

    def test_rows_come_newest_first_up_to_the_limit(self, store: Store) -> None:
        for number in range(4):
            if number:
                before = read(store, MessageKey(str(number - 1), "t")).created_timestamp
                wait_until(lambda moment=before: read(store, MessageKey("0", "t")).read_at > moment)  # type: ignore[misc]
            pending(store, key=MessageKey(str(number), "t"))
        assert [row.key.message_id for row in store.rows(RowFilter())] == ["3", "2", "1", "0"]
        assert [row.key.message_id for row in store.rows(RowFilter(limit=2))] == ["3", "2"]

    def test_rows_leave_out_what_can_be_large(self, store: Store) -> None:
        store.checkpoint(processing(store), result=b"1")
        whole = read(store)
        (row,) = store.rows(RowFilter())
        assert (row.message, row.result) == (None, None)
        assert (row.key, row.status, row.worker, row.token) == (whole.key, whole.status, whole.worker, whole.token)
        assert row.read_at >= whole.read_at

    def test_rows_are_filtered_by_all_conditions_together(self, store: Store) -> None:
        pending(store, key=MessageKey("1", "a"))
        processing(store, key=MessageKey("2", "a"))
        done(store, key=MessageKey("3", "a"))
        store.fail(processing(store, key=MessageKey("4", "a")), error="no")
        pending(store, key=MessageKey("1", "b"))

        def listed(**conditions: object) -> set[tuple[str, str]]:
            rows = store.rows(RowFilter(**conditions))  # type: ignore[arg-type]
            return {(row.key.message_id, row.key.task_name) for row in rows}

        assert listed(status=Status.PENDING) == {("1", "a"), ("1", "b")}
        assert listed(status=Status.DONE) == {("3", "a"), ("4", "a")}
        assert listed(processed_status=ProcessedStatus.FAILURE) == {("4", "a")}
        assert listed(message_id="1") == {("1", "a"), ("1", "b")}
        assert listed(message_id="1", task_name="b") == {("1", "b")}
        assert listed(message_id="1", status=Status.DONE) == set()
        assert listed() == {("1", "a"), ("2", "a"), ("3", "a"), ("4", "a"), ("1", "b")}

    def test_patterns_have_two_wildcards_and_regard_case(self, store: Store) -> None:
        texts = {"order:1", "order:12", "order:", "Order:1", "50%", "50x", "a_b", "axb", "[a]", "a!b", "a\\b"}
        for text in texts:
            pending(store, key=MessageKey(text, text))
        expected: dict[str, set[str]] = {
            "order:*": {"order:1", "order:12", "order:"},
            "order:?": {"order:1"},
            "*1": {"order:1", "Order:1"},
            "Order*": {"Order:1"},
            "*": texts,
            "50%*": {"50%"},
            "a_?": {"a_b"},
            "[a]*": {"[a]"},
            "a!*": {"a!b"},
            "a\\*": {"a\\b"},
            "order:1": {"order:1"},
            "50%": {"50%"},
            "order": set(),
        }
        by_id = {each: {row.key.message_id for row in store.rows(RowFilter(message_id=each))} for each in expected}
        by_task = {each: {row.key.task_name for row in store.rows(RowFilter(task_name=each))} for each in expected}
        assert by_id == expected
        assert by_task == expected

    # -- counts --------------------------------------------------------------------------------------------------------

    def test_nothing_is_counted_when_there_is_nothing(self, store: Store) -> None:
        assert store.counts() == []

    def test_rows_and_duplicates_are_counted_by_task_and_status(self, store: Store) -> None:
        pending(store, key=MessageKey("1", "b"))
        pending(store, key=MessageKey("2", "b"))
        store.count_duplicate(MessageKey("1", "b"))
        store.count_duplicate(MessageKey("2", "b"))
        done(store, key=MessageKey("3", "B"))
        store.fail(processing(store, key=MessageKey("4", "B")), error="no")
        processing(store, key=MessageKey("5", "B"))
        store.checkpoint(processing(store, key=MessageKey("6", "B")), result=None)

        assert store.counts() == [
            TaskCount("B", Status.DONE, ProcessedStatus.FAILURE, rows=1, duplicates=0),
            TaskCount("B", Status.DONE, ProcessedStatus.SUCCESS, rows=1, duplicates=0),
            TaskCount("B", Status.PROCESSING, None, rows=1, duplicates=0),
            TaskCount("B", Status.PROCESSING, ProcessedStatus.SUCCESS, rows=1, duplicates=0),
            TaskCount("b", Status.PENDING, None, rows=2, duplicates=2),
        ]

    # -- life ----------------------------------------------------------------------------------------------------------

    def test_what_is_there_is_not_made_again(self, store: Store) -> None:
        store.init()
        pending(store)
        assert not store.init()
        assert store.find(KEY) is not None

    def test_a_store_that_is_there_checks_out(self, store: Store) -> None:
        store.init()
        store.check()

    def test_a_closed_store_may_be_used_again(self, store: Store) -> None:
        pending(store)
        store.close()
        store.close()
        assert read(store).status is Status.PENDING

    def test_handles_see_the_same_rows(self, store: Store, open_store_again: Callable[[], Store]) -> None:
        other = open_store_again()
        try:
            pending(store)
            held = claim(other)
            assert read(store).token == held.token
            assert store.complete(held, result=b"1")
            assert read(other).result == b"1"
        finally:
            other.close()
