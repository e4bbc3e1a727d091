"""The contract of the rescue's verbs: ``lapsed``, ``waiting``, ``doubt``, ``newest``, ``find_all``."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from datetime import timedelta
from functools import partial

from celery_idempotent.core.records import MAY_HAVE_RUN, MessageKey, Row
from celery_idempotent.core.store import LARGE_MESSAGE, Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import (
    KEY,
    LEASE,
    claim,
    done,
    ids,
    overdue,
    pending,
    processing,
    read,
    take,
    wait_until,
)

__all__ = ["RescueContract"]

LONG = 3600.0


def _later(store: Store, row: Row) -> bool:
    return read(store, row.key).read_at > row.read_at


class RescueContract(StoreFixtures):
    """Messages to rescue, and the right to publish them again."""

    # -- lapsed --------------------------------------------------------------------------------------------------------

    def test_leases_that_ran_out_are_listed_with_their_messages(self, store: Store) -> None:
        row = overdue(store)
        processing(store, key=MessageKey("live", "t"))
        pending(store, key=MessageKey("pending", "t"))
        done(store, key=MessageKey("done", "t"))

        (lapsed,) = store.lapsed(again_after=LONG, limit=10)

        assert (lapsed.key, lapsed.token, lapsed.message) == (row.key, row.token, row.message)

    def test_no_more_are_listed_than_asked_for(self, store: Store) -> None:
        for number in range(3):
            overdue(store, f"m{number}")
            pending(store, key=MessageKey(f"w{number}", "t"))
            pending(store, key=MessageKey(f"u{number}", "t"), published=False)
        wait_until(lambda: len(store.waiting(older_than=0.0, limit=10)) == 3)
        assert ids(store.lapsed(again_after=LONG, limit=2)) == ["m0", "m1"]
        assert ids(store.waiting(older_than=0.0, limit=2)) == ["w0", "w1"]
        assert ids(store.unsent(limit=2)) == ["u0", "u1"]

    def test_a_lapsed_message_published_again_is_listed_again_after_a_while(self, store: Store) -> None:
        row = overdue(store)
        assert store.republish(row)
        assert store.lapsed(again_after=LONG, limit=10) == []
        wait_until(lambda: ids(store.lapsed(again_after=0.0, limit=10)) == [KEY.message_id])

    def test_of_two_that_publish_a_lapsed_message_again_one_succeeds(self, store: Store) -> None:
        row = overdue(store)
        assert store.republish(row)
        assert not store.republish(row)

    def test_a_message_whose_lease_lives_is_not_published_again(self, store: Store) -> None:
        held = processing(store)
        assert not store.republish(read(store))
        store.expire(held)
        row = read(store)
        store.renew([held], lease=LEASE)
        assert not store.republish(row)

    def test_a_message_taken_over_is_not_published_again(self, store: Store) -> None:
        row = overdue(store)
        assert take(store, row) is not None
        assert not store.republish(row)

    # -- waiting -------------------------------------------------------------------------------------------------------

    def test_messages_that_wait_are_listed_with_their_messages(self, store: Store) -> None:
        row = pending(store)
        done(store, key=MessageKey("done", "t"))
        processing(store, key=MessageKey("running", "t"))
        pending(store, key=MessageKey("unsent", "t"), published=False)
        wait_until(lambda: store.waiting(older_than=0.0, limit=10) != [])
        (waiting,) = store.waiting(older_than=0.0, limit=10)
        assert (waiting.key, waiting.message) == (row.key, row.message)
        assert store.waiting(older_than=LONG, limit=10) == []

    def test_a_message_is_not_waiting_before_it_is_due(self, store: Store) -> None:
        pending(store, key=MessageKey("later", "t"), delay=LONG)
        pending(store, key=MessageKey("due", "t"), delay=-LONG)
        wait_until(lambda: store.waiting(older_than=0.0, limit=10) != [])
        assert ids(store.waiting(older_than=0.0, limit=10)) == ["due"]

    def test_messages_of_one_queue_are_listed(self, store: Store) -> None:
        pending(store, key=MessageKey("a", "t"), queue="a")
        pending(store, key=MessageKey("b", "t"), queue="b")
        wait_until(lambda: len(store.waiting(older_than=0.0, limit=10)) == 2)
        assert ids(
            store.waiting(older_than=0.0, limit=10, before={"b": read(store, MessageKey("b", "t")).read_at})
        ) == ["b"]

    def test_messages_published_before_a_moment_are_listed(self, store: Store) -> None:
        row = pending(store)
        assert row.published_at is not None
        wait_until(lambda: store.waiting(older_than=0.0, limit=10) != [])
        assert store.waiting(older_than=0.0, limit=10, before={"celery": row.published_at}) == []
        after = row.published_at + timedelta(milliseconds=1)
        assert ids(store.waiting(older_than=0.0, limit=10, before={"celery": after})) == [KEY.message_id]

    def test_a_message_published_again_waits_anew_behind_the_others(self, store: Store) -> None:
        first = pending(store, key=MessageKey("first", "t"))
        pending(store, key=MessageKey("second", "t"))
        assert store.republish(first)
        wait_until(lambda: len(store.waiting(older_than=0.0, limit=10)) == 2)
        assert ids(store.waiting(older_than=0.0, limit=10)) == ["second", "first"]

    def test_only_messages_of_some_tasks_are_listed(self, store: Store) -> None:
        for task in ("ours", "theirs"):
            pending(store, key=MessageKey("waits", task))
            pending(store, key=MessageKey("unsent", task), published=False)
            held = processing(store, key=MessageKey("lapsed", task))
            row = read(store, held.key)
            wait_until(partial(_later, store, row))
            store.expire(held)
        wait_until(lambda: len(store.waiting(older_than=0.0, limit=10)) == 2)
        soon = read(store, MessageKey("waits", "ours")).read_at + timedelta(days=1)
        for tasks, names in ((["ours"], ["ours"]), (["ours", "theirs"], ["ours", "theirs"]), ([], []), (["none"], [])):
            found = [
                store.waiting(older_than=0.0, limit=10, tasks=tasks),
                store.waiting(older_than=0.0, limit=10, before={"celery": soon, "other": soon}, tasks=tasks),
                store.unsent(limit=10, tasks=tasks),
                store.lapsed(again_after=LONG, limit=10, tasks=tasks),
            ]
            assert [sorted(row.key.task_name for row in rows) for rows in found] == [names] * 4

    def test_of_many_queues_each_has_its_own_moment(self, store: Store) -> None:
        rows = {name: pending(store, key=MessageKey(name, "t"), queue=name) for name in ("a", "b", "c")}
        wait_until(lambda: len(store.waiting(older_than=0.0, limit=10)) == 3)
        soon = read(store, MessageKey("a", "t")).read_at + timedelta(days=1)
        published = rows["b"].published_at
        assert published is not None
        before = {"a": soon, "b": published, **{f"none {number}": soon for number in range(120)}}
        assert ids(store.waiting(older_than=0.0, limit=10, before=before)) == ["a"]

    def test_large_messages_and_results_are_not_listed(self, store: Store) -> None:
        large, small = b"x" * (LARGE_MESSAGE + 1), b"x" * LARGE_MESSAGE
        for name, message in (("large", large), ("small", small)):
            pending(store, key=MessageKey(name, "t"), published=False, message=message)
        assert {row.key.message_id: row.message for row in store.unsent(limit=10)} == {"large": None, "small": small}
        assert read(store, MessageKey("large", "t")).message == large

    def test_many_messages_are_found_at_once(self, store: Store) -> None:
        keys = [pending(store, key=MessageKey(f"m{number}", "t")).key for number in range(3)]
        found = store.find_all([*keys, MessageKey("m0", "other")])
        assert {row.key for row in found} == set(keys)
        assert all(row.message is None for row in found)
        assert store.find_all([]) == []

    # -- doubt ---------------------------------------------------------------------------------------------------------

    def test_a_message_that_may_have_run_is_listed_only_on_demand(self, store: Store) -> None:
        waits, lapsed = pending(store), overdue(store, "lapsed")
        wait_until(lambda: store.waiting(older_than=0.0, limit=10) != [])
        soon = read(store, lapsed.key).read_at + timedelta(days=1)

        store.doubt([waits.key, lapsed.key, MessageKey("none", "t")])

        assert [read(store, row.key).error for row in (waits, lapsed)] == [MAY_HAVE_RUN, MAY_HAVE_RUN]
        assert read(store).may_have_run
        assert not read(store, lapsed.key).forbidden
        for before in (None, {"celery": soon}):
            assert store.waiting(older_than=0.0, limit=10, before=before, doubted=False) == []
            assert ids(store.waiting(older_than=0.0, limit=10, before=before)) == [KEY.message_id]
        assert store.lapsed(again_after=LONG, limit=10, doubted=False) == []
        assert store.health().lapsed_since is None
        assert ids(store.lapsed(again_after=LONG, limit=10)) == ["lapsed"]

    def test_a_claim_ends_the_doubt(self, store: Store) -> None:
        waits, lapsed = pending(store), overdue(store, "lapsed")
        store.doubt([waits.key, lapsed.key])
        claim(store)
        assert take(store, read(store, lapsed.key)) is not None
        assert [read(store, row.key).error for row in (waits, lapsed)] == [None, None]

    def test_what_has_not_waited_is_not_in_doubt(self, store: Store) -> None:
        unsent = pending(store, key=MessageKey("unsent", "t"), published=False)
        runs, ended = processing(store, key=MessageKey("runs", "t")), done(store, key=MessageKey("done", "t"))
        forbidden, point = overdue(store, "forbidden"), processing(store, key=MessageKey("point", "t"))
        assert store.forbid(forbidden, error="revoked")
        assert store.checkpoint(point, result=b"1")
        assert store.expire(point)
        store.doubt([unsent.key, runs.key, ended.key, forbidden.key, point.key])
        store.doubt([])
        errors = [read(store, each.key).error for each in (unsent, runs, ended, forbidden, point)]
        assert errors == [None, None, None, "revoked", None]

    # -- newest ----------------------------------------------------------------------------------------------------

    def test_messages_that_ran_or_run_are_listed_newest_first(self, store: Store) -> None:
        keys = [MessageKey(f"m{number}", "t") for number in range(3)]
        done(store, key=keys[0])
        wait_until(lambda: read(store, keys[0]).read_at > read(store, keys[0]).created_timestamp)
        processing(store, key=keys[1])
        wait_until(lambda: read(store, keys[1]).read_at > read(store, keys[1]).created_timestamp)
        done(store, key=keys[2])
        pending(store, key=MessageKey("pending", "t"))
        never_ran = pending(store, key=MessageKey("cancelled", "t"))
        assert store.cancel(never_ran.key, task_id=never_ran.task_id, error="revoked")
        assert [row.key for row in store.newest(limit=10)] == keys[::-1]
        # The running one, and the one that ended last.
        assert [row.key for row in store.newest(limit=1)] == [keys[2], keys[1]]
