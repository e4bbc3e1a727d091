"""Every verb of the store, in every way in which it sends a statement of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from celery_idempotent.core.records import Claim, MessageKey, Owner, ProcessedStatus, RowFilter, Status
from celery_idempotent.core.store import Store
from celery_idempotent.stores.sql import SQLStore
from celery_idempotent.testing.examples import (
    KEY,
    LEASE,
    WORKER,
    claim,
    expired_id,
    new_message,
    pending,
    processing,
    try_claim,
)
from tests.integration.stores.sql.test_round_trips import VERBS

__all__ = ["EVERYTHING", "USED", "Verb"]

#: The ids of the messages that the verbs below leave.
USED = [KEY.message_id, *(f"m{number}" for number in range(300))]

_LONG_AGO = 24 * 3600.0

Prepared = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb in one situation.

    Attributes:
        prepare: Makes the situation, and answers with the call.
        indexes: By which the call finds its rows; each of its statements by one of them.
        sorts: Whether it sorts: what runs, or what the relay waits for, and nothing that grows with the log or with a backlog.
        reads_all: Whether it is an operator's question for which the whole table may be read.
        on_mysql: Indexes that serve there too, where they are not partial.
        reads_backlog: Where it reads all that waits, as whoever asks wants it, or is about to do.
    """

    prepare: Callable[[SQLStore], Prepared]
    indexes: frozenset[str] = frozenset({"pkey"})
    sorts: bool = False
    reads_all: bool = False
    on_mysql: frozenset[str] = frozenset()
    reads_backlog: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return getattr(self.prepare, "__name__", "verb")


# -- producer -----------------------------------------------------------------------------------------------------------------------


def record_a_duplicate(store: Store) -> Prepared:
    pending(store)
    return partial(store.record, new_message())


def record_an_id_that_is_free_again(store: Store) -> Prepared:
    expired_id(store)
    return partial(store.record, new_message())


def record_an_id_that_is_free_again_in_a_transaction(store: SQLStore) -> Prepared:
    expired_id(store)

    def in_a_transaction() -> None:
        with store.engine.begin() as connection:
            store.within(connection).record(new_message())

    return in_a_transaction


def record_many_of_which_some_are_there(store: Store) -> Prepared:
    messages = [new_message(MessageKey(f"m{number}", "t")) for number in range(40)]
    store.record_all(messages[:20])
    return partial(store.record_all, messages)


def withdraw_an_id_that_had_been_used(store: Store) -> Prepared:
    expired_id(store)
    pending(store)
    return partial(store.withdraw, KEY, task_id="task-1")


# -- consumer -----------------------------------------------------------------------------------------------------------------------


def claim_a_message_nobody_recorded(store: Store) -> Prepared:
    return partial(try_claim, store)


def claim_an_id_that_is_free_again(store: Store) -> Prepared:
    expired_id(store)
    return partial(try_claim, store, new_message(task_id="task-2"))


def claim_what_another_has(store: Store) -> Prepared:
    processing(store)
    return partial(try_claim, store)


def renew_by_worker(store: Store) -> Prepared:
    processing(store)
    return partial(store.renew, [Owner(KEY, WORKER)], lease=LEASE * 2)


def renew_what_is_lost(store: Store) -> Prepared:
    processing(store)
    return partial(store.renew, [Claim(KEY, 77)], lease=LEASE * 2)


def complete_what_is_lost(store: Store) -> Prepared:
    processing(store)
    return partial(store.complete, Claim(KEY, 77), result=None)


def retry_by_worker(store: Store) -> Prepared:
    processing(store)
    return partial(store.retry, Owner(KEY, WORKER), new_message(attempt=1))


def release_by_worker(store: Store) -> Prepared:
    processing(store)
    return partial(store.release, Owner(KEY, WORKER))


def expire_by_worker(store: Store) -> Prepared:
    processing(store)
    return partial(store.expire, Owner(KEY, WORKER))


# -- recovery -----------------------------------------------------------------------------------------------------------------------


def what_lapsed(store: Store) -> Prepared:
    return partial(store.lapsed, again_after=300.0, limit=200)


def what_waits_on_a_queue(store: Store) -> Prepared:
    soon = datetime.now(UTC) + timedelta(days=1)
    return partial(store.waiting, older_than=0.0, limit=200, before={"slow": soon})


def what_waits_on_a_queue_of_few(store: Store) -> Prepared:
    soon = datetime.now(UTC) + timedelta(days=1)
    return partial(store.waiting, older_than=0.0, limit=200, before={"mail": soon})


def what_was_overtaken_on_many_queues(store: Store) -> Prepared:
    soon = datetime.now(UTC) + timedelta(days=1)
    before = {**{f"tenant {number}": soon for number in range(120)}, "mail": soon}
    return partial(store.waiting, older_than=0.0, limit=200, before=before, tasks=["t", "shop.charge"])


def what_another_app_has_unsent(store: Store) -> Prepared:
    return partial(store.unsent, limit=200, tasks=["of.another.app"])


def what_many_messages_are_like(store: Store) -> Prepared:
    keys = [pending(store, key=MessageKey(f"m{number}", "t")).key for number in range(30)]
    return partial(store.find_all, keys)


def whose_ids_many_are(store: SQLStore) -> Prepared:
    keys = [pending(store, key=MessageKey(f"m{number}", "t")).key for number in range(30)]
    return partial(store.recorded, keys)


def what_waits_on_any_queue(store: Store) -> Prepared:
    return partial(store.waiting, older_than=0.0, limit=200)


def what_was_never_sent(store: Store) -> Prepared:
    return partial(store.unsent, limit=200)


def what_was_not_published_after_all(store: Store) -> Prepared:
    row = pending(store)
    return partial(store.not_published, row.key, token=row.token)


def purge(store: Store) -> Prepared:
    return partial(store.purge, older_than=_LONG_AGO, limit=200)


def purge_on(store: Store) -> Prepared:
    store.purge(older_than=_LONG_AGO, limit=200)
    return partial(store.purge, older_than=_LONG_AGO, limit=200)


def what_ran_last(store: Store) -> Prepared:
    return partial(store.newest, limit=1000)


# -- operators ----------------------------------------------------------------------------------------------------------------------


def list_an_id(store: Store) -> Prepared:
    pending(store)
    return lambda: list(store.rows(RowFilter(message_id=KEY.message_id)))


def list_what_runs(store: Store) -> Prepared:
    return lambda: list(store.rows(RowFilter(status=Status.PROCESSING)))


def list_the_newest(store: Store) -> Prepared:
    return lambda: list(store.rows(RowFilter(limit=10)))


def list_the_oldest(store: Store) -> Prepared:
    return lambda: list(store.rows(RowFilter(limit=10, oldest_first=True)))


def forget_what_is_not_as_it_was(store: SQLStore) -> Prepared:
    row = pending(store)
    claim(store)
    return partial(store.forget, row)


def purge_what_is_chosen(store: SQLStore) -> Prepared:
    return partial(
        store.purge,
        older_than=_LONG_AGO,
        failures_older_than=2 * _LONG_AGO,
        limit=200,
        processed_status=ProcessedStatus.SUCCESS,
    )


def what_may_be_purged(store: SQLStore) -> Prepared:
    return partial(store.purgeable, older_than=_LONG_AGO)


def how_the_log_stands(store: SQLStore) -> Prepared:
    return store.health


def count(store: Store) -> Prepared:
    return store.counts


_OPEN, _PROCESSED = frozenset({"open"}), frozenset({"processed"})

EVERYTHING = [
    *(Verb(verb) for verb in VERBS),
    Verb(record_a_duplicate),
    Verb(record_an_id_that_is_free_again),
    Verb(record_an_id_that_is_free_again_in_a_transaction),
    Verb(record_many_of_which_some_are_there),
    Verb(withdraw_an_id_that_had_been_used),
    Verb(claim_a_message_nobody_recorded),
    Verb(claim_an_id_that_is_free_again),
    Verb(claim_what_another_has),
    Verb(renew_by_worker),
    Verb(renew_what_is_lost),
    Verb(complete_what_is_lost),
    Verb(retry_by_worker),
    Verb(release_by_worker),
    Verb(expire_by_worker),
    Verb(what_lapsed, _OPEN, sorts=True),
    Verb(what_waits_on_a_queue, _OPEN, on_mysql=_PROCESSED),
    Verb(what_waits_on_a_queue_of_few, _OPEN, on_mysql=_PROCESSED),
    # What waits on no queue is sorted by PostgreSQL, for which null is not one value.
    Verb(what_waits_on_any_queue, _OPEN, sorts=True, on_mysql=_PROCESSED, reads_backlog=frozenset({"mysql"})),
    Verb(what_was_overtaken_on_many_queues, _OPEN, sorts=True, on_mysql=_PROCESSED),
    Verb(what_was_never_sent, _PROCESSED, sorts=True),
    Verb(what_another_app_has_unsent, _PROCESSED, sorts=True),
    Verb(what_many_messages_are_like),
    Verb(whose_ids_many_are),
    Verb(what_was_not_published_after_all),
    Verb(purge, frozenset({"pkey", "processed"})),
    Verb(purge_what_is_chosen, frozenset({"pkey", "processed"})),
    Verb(purge_on, frozenset({"pkey", "processed"})),
    Verb(what_ran_last, _OPEN | _PROCESSED, sorts=True),
    Verb(list_an_id, sorts=True),
    Verb(list_what_runs, _OPEN, sorts=True),
    Verb(list_the_newest, frozenset(), sorts=True, reads_all=True),
    Verb(list_the_oldest, frozenset(), sorts=True, reads_all=True),
    Verb(forget_what_is_not_as_it_was),
    # All that is past retention, of which PostgreSQL, planning without the parameters, supposes that it is a third.
    Verb(what_may_be_purged, _PROCESSED, reads_all=True),
    Verb(how_the_log_stands, _OPEN | _PROCESSED, reads_backlog=frozenset({"mysql", "postgresql", "sqlite"})),
    Verb(count, frozenset(), reads_all=True),
]
