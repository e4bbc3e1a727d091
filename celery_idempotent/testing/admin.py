"""The contract of the operators' verbs."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from celery_idempotent.core.records import (
    FORGOTTEN,
    Claimed,
    Inserted,
    MessageKey,
    ProcessedStatus,
    RowFilter,
    Status,
    TaskCount,
)
from celery_idempotent.core.store import Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import (
    KEY,
    claim,
    done,
    new_message,
    pending,
    processing,
    read,
    try_claim,
    wait_until,
)

__all__ = ["AdminContract"]


class AdminContract(StoreFixtures):
    """``find``, ``rows``, ``counts``; ``forget``, ``purgeable``, ``health``, ``configuration``."""

    def test_rows_are_listed_by_queue(self, store: Store) -> None:
        for name, queue in (("a", "mail.fast"), ("b", "mail.slow"), ("c", "m"), ("d", None)):
            pending(store, key=MessageKey(name, "t"), queue=queue)
        pending(store, key=MessageKey("e", "t"), queue="mail.slow", published=False)
        done(store, key=MessageKey("f", "t"), queue="mail.slow")
        expected = {"mail.*": "abef", "mail.slow": "bef", "m": "c", "?": "c", "*": "abcef", "none": ""}
        for queue, names in expected.items():
            assert {row.key.message_id for row in store.rows(RowFilter(queue=queue))} == set(names)
        waiting = store.rows(RowFilter(queue="mail.slow", status=Status.PENDING))
        assert {row.key.message_id for row in waiting} == {"b", "e"}

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
        oldest = RowFilter(limit=3, oldest_first=True)
        assert [row.key.message_id for row in store.rows(oldest)] == ["0", "1", "2"]

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

    def test_errors_are_filtered_by_their_text(self, store: Store) -> None:
        errors = {
            "1": "ConnectionError: down",
            "2": "connectionerror: down",
            "3": "ValueError: 50% of\nnothing",
            "4": "abandoned: the worker died",
        }
        for name, error in errors.items():
            store.fail(processing(store, key=MessageKey(name, "t")), error=error)
        pending(store, key=MessageKey("5", "t"))
        done(store, key=MessageKey("6", "t"))
        expected = {
            "ConnectionError*": {"1"},
            "*: down": {"1", "2"},
            "connectionerror: down": {"2"},
            "*50% of*": {"3"},
            "*nothing": {"3"},
            "abandoned*": {"4"},
            "down": set(),
            "*": {"1", "2", "3", "4"},
        }
        found = {each: {row.key.message_id for row in store.rows(RowFilter(error=each))} for each in expected}
        assert found == expected
        both = RowFilter(error="*down", message_id="2", status=Status.DONE)
        assert [row.key.message_id for row in store.rows(both)] == ["2"]

    def test_an_age_counts_from_the_end_and_before_it_from_the_recording(self, store: Store) -> None:
        def listed(**ages: float) -> set[str]:
            return {row.key.message_id for row in store.rows(RowFilter(**ages))}  # type: ignore[arg-type]

        pending(store, key=MessageKey("waits", "t"))
        ended = processing(store, key=MessageKey("ended late", "t"))
        recorded = read(store, ended.key).created_timestamp
        wait_until(lambda: (read(store, ended.key).read_at - recorded).total_seconds() > 0.2)
        store.complete(ended, result=None)
        processed = read(store, ended.key).processed_timestamp
        assert processed is not None

        def told_apart() -> bool:
            age = (read(store, ended.key).read_at - recorded).total_seconds()
            older, newer = listed(older_than=age), listed(newer_than=age)
            both = listed(older_than=age, newer_than=age + 3600.0)
            if (read(store, ended.key).read_at - processed).total_seconds() >= age:
                return False  # so slow that the other message is that old too now
            assert (older, newer, both) == ({"waits"}, {"ended late"}, {"waits"})
            return True

        wait_until(told_apart)
        assert listed(older_than=0.0) == listed(newer_than=3600.0) == {"waits", "ended late"}
        assert listed(older_than=3600.0) == listed(newer_than=0.0) == set()

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

    # -- forget ---------------------------------------------------------------------------------------------------------

    def test_a_forgotten_id_is_free(self, store: Store) -> None:
        done(store)
        assert store.forget(read(store))
        row = read(store)
        assert (row.status, row.processed_status, row.error) == (Status.DONE, ProcessedStatus.FAILURE, FORGOTTEN)
        assert (row.message, row.result, row.fingerprint) == (None, None, None)
        assert row.expired
        assert store.record(new_message(task_id="task-2", fingerprint="b" * 64)) == Inserted()
        assert (read(store).task_id, read(store).status) == ("task-2", Status.PENDING)

    def test_what_is_forgotten_is_no_failure(self, store: Store) -> None:
        failed, forgotten, succeeded, waiting = (
            MessageKey(name, "t") for name in ("failed", "forgotten", "succeeded", "waiting")
        )
        for key in (failed, forgotten):
            assert store.fail(processing(store, key=key), error="ValueError: no")
        done(store, key=succeeded)
        pending(store, key=waiting)
        for key in (forgotten, succeeded, waiting):
            assert store.forget(read(store, key))
        failures = list(store.rows(RowFilter(processed_status=ProcessedStatus.FAILURE)))
        assert [row.key for row in failures] == [failed]
        assert {row.error for row in store.rows(RowFilter(status=Status.DONE))} == {FORGOTTEN, "ValueError: no"}
        assert len(list(store.rows(RowFilter(error=FORGOTTEN)))) == 3
        assert store.counts() == [TaskCount("t", Status.DONE, ProcessedStatus.FAILURE, rows=1, duplicates=0)]

    def test_what_is_forgotten_while_it_runs_stays_fenced(self, store: Store) -> None:
        old = processing(store)
        assert store.forget(read(store))
        assert store.record(new_message(task_id="task-2")) == Inserted()
        new = claim(store, new_message(task_id="task-2"))
        assert new.token > old.token
        assert not store.complete(old, result=b"1")
        assert not store.fail(old, error="late")
        assert not store.checkpoint(old, result=b"1")
        assert store.renew([old], lease=60.0) == [old]
        assert store.complete(new, result=b"2")
        assert read(store).result == b"2"

    def test_a_run_whose_message_was_forgotten_has_lost_its_claim(self, store: Store) -> None:
        held = processing(store)
        assert store.forget(read(store))
        assert not store.complete(held, result=b"1")
        assert read(store).error == FORGOTTEN

    def test_what_waits_is_forgotten_too_and_a_copy_of_it_is_new(self, store: Store) -> None:
        row = pending(store, delay=3600.0)
        assert store.forget(row)
        assert store.waiting(older_than=0.0, limit=10) == []
        assert store.unsent(limit=10) == []
        assert isinstance(try_claim(store), Claimed)

    def test_only_a_row_that_stands_as_read_is_forgotten(self, store: Store) -> None:
        row = pending(store)
        claim(store)
        assert not store.forget(row)
        assert read(store).status is Status.PROCESSING

    def test_nothing_is_forgotten_that_is_not_there(self, store: Store) -> None:
        row = pending(store)
        assert store.withdraw(KEY, task_id=row.task_id)
        assert not store.forget(row)
        assert store.find(KEY) is None

    def test_what_is_forgotten_is_purged_by_when_it_was_done(self, store: Store) -> None:
        done(store)
        ended = read(store).processed_timestamp
        assert store.forget(read(store))
        assert read(store).processed_timestamp == ended
        wait_until(lambda: store.purge(older_than=0.0, limit=10) == 1)
        assert store.find(KEY) is None

    # -- health ---------------------------------------------------------------------------------------------------------

    def test_as_many_are_purgeable_as_are_purged(self, store: Store) -> None:
        for number in range(3):
            done(store, key=MessageKey(str(number), "t"))
        done(store, key=MessageKey("kept", "t"), unique_for=3600.0)
        done(store, key=MessageKey("free again", "t"), unique_for=0.001)
        pending(store, key=MessageKey("waits", "t"))
        processing(store, key=MessageKey("runs", "t"))
        wait_until(lambda: store.purgeable(older_than=0.0) == 4)
        assert store.purgeable(older_than=3600.0) == 0
        assert store.purge(older_than=0.0, limit=100) == 4
        assert store.purgeable(older_than=0.0) == 0

    def test_an_empty_log_is_in_good_health(self, store: Store) -> None:
        store.init()
        found = store.health()
        assert (found.last_due, found.lapsed_since, found.unsent_since, found.done_since) == (None, None, None, None)
        before = pending(store).created_timestamp
        assert abs((found.read_at - before).total_seconds()) < 60.0

    def test_the_health_tells_what_is_due_last(self, store: Store) -> None:
        pending(store, key=MessageKey("at once", "t"))
        pending(store, key=MessageKey("soon", "t"), delay=60.0, queue="other")
        pending(store, key=MessageKey("late", "t"), delay=7200.0)
        pending(store, key=MessageKey("past", "t"), delay=-60.0)
        assert store.health().last_due == read(store, MessageKey("late", "t")).available_at
        claim(store, new_message(MessageKey("late", "t")))
        assert store.health().last_due == read(store, MessageKey("soon", "t")).available_at

    def test_the_health_tells_since_when_leases_have_lapsed(self, store: Store) -> None:
        processing(store, key=MessageKey("lives", "t"))
        first = processing(store, key=MessageKey("dead", "t"))
        second = processing(store, key=MessageKey("dead too", "t"))
        assert store.health().lapsed_since is None
        for held in (first, second):
            wait_until(lambda: read(store, held.key).read_at > read(store, held.key).created_timestamp)  # noqa: B023
            store.expire(held)
        wait_until(lambda: store.health().lapsed_since == read(store, first.key).lease_expires_at)
        assert store.republish(read(store, first.key))
        assert store.health().lapsed_since == read(store, second.key).lease_expires_at

    def test_the_health_tells_since_when_something_was_not_published(self, store: Store) -> None:
        pending(store, key=MessageKey("being published", "t"), published=False, publish_within=60.0)
        assert store.health().unsent_since is None
        row = pending(store, key=MessageKey("left", "t"), published=False)
        assert store.health().unsent_since == row.created_timestamp
        store.relayed([row.key], published=True)
        assert store.health().unsent_since is None

    def test_the_health_tells_since_when_something_may_be_purged(self, store: Store) -> None:
        done(store, key=MessageKey("kept", "t"), unique_for=3600.0)
        assert store.health().done_since is None
        done(store, key=MessageKey("1", "t"), unique_for=0.001)
        ended = read(store, MessageKey("1", "t")).processed_timestamp
        wait_until(lambda: store.health().done_since == ended)
        done(store, key=MessageKey("2", "t"))
        assert store.health().done_since == ended

    def test_the_configuration_is_told_by_name(self, store: Store) -> None:
        store.init()
        settings = store.configuration()
        assert settings
        assert {type(each) for pair in settings.items() for each in pair} == {str}
