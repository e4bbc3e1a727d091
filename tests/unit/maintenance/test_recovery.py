"""What a recovery pass publishes and what it leaves alone, on a broker and a store in this process.

Nobody waits here for time to pass: rows are made older in the store, whose clock is the only one that counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from celery import Celery
from kombu.message import Message

from celery_idempotent import IdempotentTask, QueueLog
from celery_idempotent.core.records import Claim, Claimed, MessageKey, NewMessage, ProcessedStatus, Row, Status
from celery_idempotent.maintenance import purge as purging
from celery_idempotent.maintenance import recovery as recovering
from celery_idempotent.maintenance import rescue as rescuing
from celery_idempotent.maintenance.purge import purge, purgeable
from celery_idempotent.maintenance.recovery import Recovered, Recovery
from celery_idempotent.maintenance.rescue import Rescue
from celery_idempotent.message.serialization import encode_message
from celery_idempotent.producer import relay as relaying
from celery_idempotent.stores.sql import SQLStore

LOST_AFTER = 300.0
RETENTION = 86400.0
TASK = "charge"

TIMES = (
    "created_timestamp",
    "processed_timestamp",
    "lease_expires_at",
    "available_at",
    "published_at",
    "expires_at",
)


@dataclass
class Shop:
    """An app whose messages go nowhere but into the broker's memory."""

    app: Celery
    store: SQLStore

    def run_pass(self) -> Recovered:
        return Recovery(QueueLog.of(self.app)).run_pass()

    # -- rows ----------------------------------------------------------------------------------------------------------

    def pending(self, name: str | None = None, *, task: str = TASK, args: Any = (7,), **changes: Any) -> MessageKey:
        """Return a recorded message."""
        key = MessageKey(name or uuid4().hex, task)
        options = changes.pop("options", {})
        encoded = encode_message(args, {}, {"task_id": f"id-{key.message_id}", **options}, serializer="json")
        changes = {"queue": self.app.conf.task_default_queue, "message": encoded, **changes}
        self.store.record(NewMessage(key, f"id-{key.message_id}", **changes))
        return key

    def claimed(self, name: str | None = None, *, attempt: int = 0, **changes: Any) -> Claim:
        """Return a message that runs."""
        key = self.pending(name, **changes)
        message = NewMessage(key, f"id-{key.message_id}", attempt=attempt)
        answer = self.store.claim(message, worker="w:1", lease=60.0, grace=0.0)
        assert isinstance(answer, Claimed)
        return answer.claim

    def lapsed(self, name: str | None = None, **changes: Any) -> MessageKey:
        """Return a message whose owner is gone."""
        claim = self.claimed(name, **changes)
        self.age(
            1.0, claim.key
        )  # or it may have been published and have lost its owner in one millisecond, the clock's finest
        self.store.expire(claim)
        return claim.key

    def done(self, name: str | None = None) -> MessageKey:
        claim = self.claimed(name)
        self.store.complete(claim, result=b"1")
        return claim.key

    def row(self, key: MessageKey) -> Row:
        row = self.store.find(key)
        assert row is not None
        return row

    def age(self, seconds: float, *keys: MessageKey) -> None:
        """Let time pass for some rows, or for all."""
        table = self.store._table
        with self.store.engine.begin() as connection:
            for row in connection.execute(sa.select(table)).mappings().all():
                key = MessageKey(row["message_id"], row["task_name"])
                if keys and key not in keys:
                    continue
                older = {name: row[name] - timedelta(seconds=seconds) for name in TIMES if row[name] is not None}
                where = (table.c.message_id == key.message_id, table.c.task_name == key.task_name)
                connection.execute(sa.update(table).where(*where).values(older))

    # -- the broker ----------------------------------------------------------------------------------------------------

    def messages(self) -> list[Message]:
        """Return what is on the queue; it is empty then."""
        taken: list[Message] = []
        with self.app.connection_for_read() as connection:
            channel = connection.default_channel
            queue = self.app.amqp.queues[self.app.conf.task_default_queue](channel)
            queue.declare()
            while (message := queue.get(no_ack=True)) is not None:
                taken.append(message)
        return taken

    def published(self) -> list[str]:
        """Return the message ids of what is on the queue."""
        return [message.properties["message_id"] for message in self.messages()]

    def consumed(self, key: MessageKey) -> None:
        """Note that a worker of this process was given a message."""
        Rescue.of(self.app.queue_log).saw(self.app.conf.task_default_queue, key)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    app = Celery("shop", broker=f"memory://{uuid4().hex}", set_as_current=False)
    store = SQLStore(f"sqlite:///{tmp_path / 'store.db'}")
    QueueLog(app, store=store)
    app.conf.update(
        task_default_queue=f"shop-{uuid4().hex}", idempotent_lost_after=LOST_AFTER, idempotent_retention=RETENTION
    )

    @app.task(name=TASK, base=IdempotentTask, shared=False)
    def charge(amount: int) -> int:
        return amount

    app.finalize()
    store.init()
    yield Shop(app, store)
    store.close()
    app.close()


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (purging, recovering, relaying, rescuing):
        monkeypatch.setattr(module, "BATCH", 2)


class TestLeasesThatRanOut:
    def test_the_message_is_published_as_it_was(self, shop: Shop) -> None:
        key = shop.lapsed("order:1", attempt=3, fingerprint="f" * 64, options={"time_limit": 9, "headers": {"a": "b"}})

        assert shop.run_pass() == Recovered(taken_back=1)

        (message,) = shop.messages()
        args, kwargs, _ = message.decode()
        assert (args, kwargs, message.properties["message_id"]) == ([7], {}, "order:1")
        headers = message.headers
        assert (headers["task"], headers["id"], headers["retries"], headers["timelimit"], headers["eta"]) == (
            *(TASK, "id-order:1", 3),
            [9, None],
            None,
        )
        assert headers["a"] == "b"
        assert headers["idempotent"] == {
            "message_id": "order:1",
            "task": TASK,
            "task_id": "id-order:1",
            "fingerprint": "f" * 64,
        }
        # The worker that gets it decides; it has no owner yet.
        assert shop.row(key).status is Status.PROCESSING

    def test_once_for_each_lease_that_ran_out(self, shop: Shop) -> None:
        key = shop.lapsed()
        assert shop.run_pass().taken_back == 1
        assert shop.run_pass().taken_back == 0
        again = shop.store.take_over(shop.row(key), task_id="t", worker="w:2", lease=60.0, attempt=0)
        assert again is not None
        assert shop.run_pass().taken_back == 0
        shop.store.expire(again.claim)
        assert shop.run_pass().taken_back == 1

    def test_unclaimed_messages_are_published_with_growing_pauses(self, shop: Shop) -> None:
        key = shop.lapsed()
        tick, at = LOST_AFTER, []
        for number in range(40):
            if shop.run_pass().taken_back:
                at.append(number)
            shop.age(tick, key)
        assert len(at) >= 4
        assert at[0] == 0
        pauses = [later - earlier for earlier, later in pairwise(at)]
        assert all(pause >= 1 for pause in pauses)
        # Each as long as all before it, to the tick.
        assert all(pause >= sum(pauses[:number]) for number, pause in enumerate(pauses))
        assert pauses[-1] > pauses[0]

    def test_pauses_do_not_grow_for_ever(self, shop: Shop) -> None:
        key = shop.lapsed()
        shop.age(30 * 86400, key)
        shop.run_pass()
        shop.age(86400 + 60, key)
        assert shop.run_pass().taken_back == 1

    def test_foreign_rows_do_not_block_recovery(self, shop: Shop, small_batches: None) -> None:
        for number in range(7):
            shop.lapsed(f"theirs:{number}", task="another.app")
        for number in range(5):
            shop.lapsed(f"ours:{number}")
        # No more than a batch in one pass, but something in each.
        while shop.run_pass().taken_back:
            pass
        assert sorted(shop.published()) == [f"ours:{number}" for number in range(5)]

    def test_rows_that_pause_do_not_keep_others_from_being_recovered(self, shop: Shop, small_batches: None) -> None:
        pausing = [shop.lapsed(f"pausing:{number}") for number in range(5)]
        for _ in range(3):
            while shop.run_pass().taken_back:
                pass
            shop.age(LOST_AFTER + 1, *pausing)
        shop.age(LOST_AFTER * 1.5, *pausing)
        shop.published()
        fresh = shop.lapsed("fresh")
        assert shop.run_pass().taken_back >= 1
        assert fresh.message_id in shop.published()

    def test_a_message_that_cannot_be_read_is_abandoned(self, shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
        key = shop.lapsed(message=b"application/x-unheard-of;binary\n\x00")
        with caplog.at_level(logging.CRITICAL, logger="celery_idempotent"):
            assert shop.run_pass() == Recovered()
        row = shop.row(key)
        assert (row.status, row.processed_status) == (Status.DONE, ProcessedStatus.FAILURE)
        assert str(row.error).startswith("abandoned")

    def test_a_message_that_cannot_be_published_does_not_keep_others_back(
        self, shop: Shop, caplog: pytest.LogCaptureFixture
    ) -> None:
        shop.app.conf.task_create_missing_queues = False
        stuck = shop.lapsed("stuck", options={"queue": "closed-down"})
        shop.lapsed("behind it")
        with caplog.at_level(logging.CRITICAL, logger="celery_idempotent"):
            assert shop.run_pass().taken_back == 1
        assert shop.published() == ["behind it"]
        # It is tried again: a reader of the log may open that queue.
        shop.app.amqp.queues.add("closed-down")
        assert shop.row(stuck).published_at is None
        assert shop.run_pass().taken_back == 1

    @pytest.mark.parametrize("ignored", [False, True])
    def test_whether_its_result_is_ignored_stays_as_it_was(self, shop: Shop, ignored: bool) -> None:
        shop.lapsed(options={"ignore_result": ignored})
        shop.run_pass()
        assert [message.headers["ignore_result"] for message in shop.messages()] == [ignored]

    def test_a_deliverys_notes_are_not_published(self, shop: Shop) -> None:
        """The message of a producer without this library is kept with all that its first delivery said."""
        shop.lapsed(options={"redelivered": True, "is_eager": False, "priority": 4})
        shop.run_pass()
        (message,) = shop.messages()
        assert not {"redelivered", "is_eager"} & {*message.properties, *message.headers}
        assert message.properties["priority"] == 4


class TestMessagesNeverPublished:
    def test_they_are_published_once(self, shop: Shop) -> None:
        key = shop.pending("outbox:1", published=False)
        shop.pending("sent by its producer")
        assert shop.run_pass() == Recovered(relayed=1)
        assert shop.run_pass() == Recovered()
        assert shop.published() == ["outbox:1"]
        assert shop.row(key).published_at is not None

    def test_their_eta_is_kept(self, shop: Shop) -> None:
        due = shop.row(shop.pending(published=False, delay=3600.0)).available_at
        assert due is not None
        shop.run_pass()
        (message,) = shop.messages()
        eta = message.headers["eta"]
        assert abs((due - due.fromisoformat(eta)).total_seconds()) < 60

    def test_one_that_cannot_be_read_does_not_keep_others_back(
        self, shop: Shop, small_batches: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        for number in range(5):
            shop.pending(f"damaged:{number}", published=False, message=None)
        shop.pending("sound", published=False)
        with caplog.at_level(logging.CRITICAL, logger="celery_idempotent"):
            assert shop.run_pass().relayed == 1
        assert shop.published() == ["sound"]


class TestMessagesLostByTheBroker:
    """A pending row is presumed lost when a message recorded so much later on its queue was claimed."""

    def test_an_overtaken_message_is_published(self, shop: Shop) -> None:
        lost = shop.pending("lost")
        shop.age(LOST_AFTER + 1, lost)
        shop.consumed(shop.done("later"))
        assert shop.run_pass() == Recovered(lost=1)
        assert shop.run_pass() == Recovered()
        assert shop.published() == ["lost"]

    def test_the_message_that_overtakes_may_still_run(self, shop: Shop) -> None:
        shop.age(LOST_AFTER + 1, shop.pending())
        shop.consumed(shop.claimed("later").key)
        assert shop.run_pass().lost == 1

    def test_a_backlog_is_not_touched_however_old(self, shop: Shop) -> None:
        backlog = [shop.pending(f"backlog:{number}") for number in range(3)]
        shop.age(30 * LOST_AFTER)
        assert shop.run_pass() == Recovered()
        # Its first message is being worked on: that one overtook nothing.
        first = shop.store.claim(NewMessage(backlog[0], "id-backlog:0"), worker="w:1", lease=60.0, grace=0.0)
        assert isinstance(first, Claimed)
        shop.consumed(backlog[0])
        assert shop.run_pass() == Recovered()

    def test_a_little_later_is_not_late(self, shop: Shop) -> None:
        """Workers that take their messages in turns overtake each other by a little all the time."""
        shop.pending("earlier")
        shop.age(LOST_AFTER - 60)
        later = shop.done("later")
        shop.age(2 * LOST_AFTER)
        shop.consumed(later)
        assert shop.run_pass() == Recovered()

    def test_a_message_that_only_waits_in_a_worker_overtakes_nothing(self, shop: Shop) -> None:
        shop.age(LOST_AFTER + 1, shop.pending())
        shop.consumed(shop.pending("prefetched"))
        assert shop.run_pass() == Recovered()

    def test_another_queue_is_another_backlog(self, shop: Shop) -> None:
        shop.age(LOST_AFTER + 1, shop.pending(queue="slow"))
        shop.consumed(shop.done("later"))
        assert shop.run_pass() == Recovered()

    def test_a_message_not_due_yet_is_not_overtaken(self, shop: Shop) -> None:
        key = shop.pending(delay=LOST_AFTER)
        shop.age(LOST_AFTER + 60, key)
        shop.consumed(shop.done("later"))
        # Due a minute ago: nothing recorded 300 s after that has been claimed.
        assert shop.run_pass() == Recovered()
        shop.age(LOST_AFTER, key)
        assert shop.run_pass().lost == 1

    def test_a_message_lost_again_is_published_with_growing_pauses(self, shop: Shop) -> None:
        lost = shop.pending()
        shop.age(LOST_AFTER + 1, lost)
        shop.consumed(shop.done("later"))
        at = []
        for number in range(40):
            if shop.run_pass().lost:
                at.append(number)
            shop.age(LOST_AFTER, lost)
        assert len(at) >= 4
        pauses = [later - earlier for earlier, later in pairwise(at)]
        assert all(pause >= sum(pauses[:number]) for number, pause in enumerate(pauses))

    def test_an_old_messages_lost_retry_pauses_as_a_new_one(self, shop: Shop) -> None:
        claim = shop.claimed("old")
        shop.age(7200, claim.key)
        key = claim.key
        message = encode_message((7,), {}, {}, serializer="json")
        queue = shop.app.conf.task_default_queue
        shop.store.retry(
            claim, NewMessage(key, f"id-{key.message_id}", attempt=1, delay=10.0, message=message, queue=queue)
        )
        shop.age(LOST_AFTER + 60, key)
        shop.consumed(shop.done("later"))
        assert shop.run_pass().lost == 1
        (message,) = shop.messages()
        assert message.headers["retries"] == 1


class TestOnDemand:
    def test_all_that_waits_is_published(self, shop: Shop, small_batches: None) -> None:
        old = {shop.pending(f"old:{number}").message_id for number in range(7)}
        never = {shop.pending(f"never:{number}", published=False).message_id for number in range(5)}
        shop.age(61)
        shop.pending("young")
        shop.pending("not due", delay=3600.0)
        shop.claimed("running")
        assert Rescue.of(shop.app.queue_log).publish_waiting(60.0) == 12
        assert set(shop.published()) == old | never
        assert Rescue.of(shop.app.queue_log).publish_waiting(60.0) == 0

    def test_it_ends_though_what_it_publishes_goes_on_waiting(self, shop: Shop, small_batches: None) -> None:
        names = {shop.pending(f"m:{number}").message_id for number in range(7)}
        shop.age(1)
        assert Rescue.of(shop.app.queue_log).publish_waiting(0.0) == 7
        assert sorted(shop.published()) == sorted(names)

    def test_an_unpublishable_message_is_skipped(self, shop: Shop, small_batches: None) -> None:
        for number in range(5):
            shop.pending(f"theirs:{number}", task="another.app")
        shop.pending("ours")
        shop.age(61)
        assert Rescue.of(shop.app.queue_log).publish_waiting(60.0) == 1
        assert shop.published() == ["ours"]


class TestPurge:
    def test_unfinished_and_recent_rows_stay(self, shop: Shop) -> None:
        old = [shop.done("done"), shop.pending("pending"), shop.claimed("running").key]
        failed = shop.claimed("failed")
        shop.store.fail(failed, error="no")
        shop.age(RETENTION + 1, *old, failed.key)
        young = shop.done("young")
        shop.age(RETENTION - 60, young)

        assert shop.run_pass().purged == 1  # the failure is kept for longer

        left = {count.status: count.rows for count in shop.store.counts()}
        assert left == {Status.PENDING: 1, Status.PROCESSING: 1, Status.DONE: 1}
        assert shop.row(young).status is Status.DONE

    def test_in_batches_until_nothing_is_left(self, shop: Shop, small_batches: None) -> None:
        for number in range(5):
            shop.done(f"done:{number}")
        shop.age(RETENTION + 1)
        assert shop.run_pass().purged == 5
        assert shop.store.counts() == []

    def test_no_longer_than_its_share_of_a_step(
        self, shop: Shop, small_batches: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(5):
            shop.done(f"done:{number}")
        shop.age(RETENTION + 1)
        purge: Callable[..., int] = shop.store.purge
        monkeypatch.setattr(purging, "_PURGE_FOR", 1e-9)
        assert shop.run_pass().purged in (0, 2)
        assert purge(older_than=RETENTION, limit=10) >= 3


def test_a_pass_on_an_empty_log_costs_few_statements(shop: Shop) -> None:
    shop.store.counts()  # a process looks at its table once
    statements: list[str] = []

    def note(*arguments: Any) -> None:
        statements.append(arguments[2])

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        shop.run_pass()
        assert len(statements) == 3
        for number in range(40):
            Rescue.of(shop.app.queue_log).saw(f"key {number}", shop.claimed(queue=f"queue {number}").key)
        statements.clear()
        shop.run_pass()
        assert len(statements) == 5
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


def test_of_thousands_of_queues_those_seen_last_are_kept_in_mind(shop: Shop) -> None:
    recovery = Rescue.of(shop.app.queue_log)
    for number in range(3000):
        recovery.saw(f"key {number}", MessageKey(f"m{number}", TASK))
    recovery.saw("key 2900", MessageKey("again", TASK))
    keys = list(recovery._latest.values())
    assert len(keys) == 500
    assert keys[0] == MessageKey("m2500", TASK)
    assert keys[-1] == MessageKey("again", TASK)


def test_rate_limited_messages_are_not_overtaken(shop: Shop) -> None:
    @shop.app.task(name="limited", base=IdempotentTask, shared=False, rate_limit="1/m")
    def limited() -> None: ...

    shop.app.conf.update(worker_prefetch_multiplier=2, worker_concurrency=5)  # ten minutes of it
    kept_back = shop.pending("kept back", task="limited", args=())
    shop.age(2 * LOST_AFTER)
    shop.consumed(shop.done("another task"))
    assert shop.run_pass().lost == 0

    later = shop.pending("later", task="limited", args=())
    answer = shop.store.claim(NewMessage(later, "id-later"), worker="w:1", lease=60.0, grace=0.0)
    assert isinstance(answer, Claimed)
    shop.consumed(later)
    assert shop.run_pass().lost == 0
    shop.age(601.0 - LOST_AFTER, kept_back)
    assert shop.run_pass().lost == 1
    assert shop.published() == ["kept back"]


def test_a_large_message_is_read_when_its_turn_has_come(shop: Shop) -> None:
    large = "x" * 100_000
    for name, published in (("unsent", False), ("lapsed", True)):
        if published:
            shop.lapsed(name, args=(large,))
        else:
            shop.pending(name, args=(large,), published=False)
    assert shop.run_pass() == Recovered(taken_back=1, relayed=1)
    assert sorted(message.decode()[0] for message in shop.messages()) == [[large], [large]]


def test_messages_of_a_task_turned_off_are_only_named(shop: Shop) -> None:
    @shop.app.task(name="off", base=IdempotentTask, shared=False, idempotent=False)
    def off() -> None: ...

    waits = shop.pending("waits", task="off", args=())
    lapsed = shop.lapsed("lapsed", task="off", args=())
    unsent = shop.pending("unsent", task="off", args=(), published=False)
    shop.age(3 * LOST_AFTER, waits)
    shop.consumed(shop.done())
    recovery = Rescue.of(shop.app.queue_log)

    assert shop.run_pass() == Recovered(relayed=1)
    assert shop.published() == ["unsent"]
    assert [shop.row(key).may_have_run for key in (waits, lapsed, unsent)] == [True, True, False]
    assert recovery.publish_waiting(0.0) == 0
    assert recovery.publish_waiting(LOST_AFTER, task="off") == 2
    assert sorted(shop.published()) == ["lapsed", "waits"]


def test_failures_are_purged_by_a_retention_of_their_own(shop: Shop) -> None:
    shop.app.conf.update(idempotent_failure_retention=3 * RETENTION)
    failed = shop.claimed("failed")
    shop.store.fail(failed, error="ValueError: no")
    shop.done("done")
    shop.age(2 * RETENTION)
    queue_log = shop.app.queue_log
    assert (purgeable(queue_log), shop.run_pass().purged) == (1, 1)
    assert purge(queue_log, older_than=0.0) == 0
    shop.age(2 * RETENTION)
    assert shop.run_pass().purged == 1
    assert shop.store.counts() == []


def test_failures_are_purged_when_they_are_named(shop: Shop) -> None:
    shop.store.fail(shop.claimed("failed"), error="ValueError: no")
    shop.age(60.0)
    queue_log = shop.app.queue_log
    assert purge(queue_log, older_than=0.0, processed_status=ProcessedStatus.SUCCESS) == 0
    assert purge(queue_log, older_than=0.0, task_name="another", processed_status=ProcessedStatus.FAILURE) == 0
    assert purge(queue_log, older_than=0.0, task_name=TASK, processed_status=ProcessedStatus.FAILURE) == 1
