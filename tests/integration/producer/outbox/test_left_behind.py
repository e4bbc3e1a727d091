"""Committed messages that were not published are relayed: once, in order, by one relay at a time."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from celery_idempotent import IdempotentTask, outbox
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.maintenance.recovery import Recovery
from celery_idempotent.producer import relay as relaying
from celery_idempotent.producer.publisher import Publisher
from celery_idempotent.producer.relay import relay
from tests.integration.producer.outbox.conftest import OutboxApp
from tests.support.waiting import wait_until


def commit(outbox_app: OutboxApp, *orders: str) -> None:
    """Commit a transaction that sends these."""
    with outbox_app.session() as session, outbox(session):
        for order in orders:
            outbox_app.app.tasks["charge"].delay(order)
        session.commit()


def left(outbox_app: OutboxApp) -> list[str]:
    return [row.key.message_id for row in outbox_app.store.unsent(limit=1000)]


def test_a_broker_that_takes_nothing_keeps_no_caller_from_committing(
    outbox_app: OutboxApp, caplog: pytest.LogCaptureFixture
) -> None:
    with outbox_app.broken_broker() as offered:
        commit(outbox_app, "o-1", "o-2")
        commit(outbox_app, "o-3")
    assert offered == ["o-1"], "then it is left in peace for a while"
    assert left(outbox_app) == ["o-1", "o-2", "o-3"]
    assert "2 committed messages are left to the relay" in caplog.text
    assert all(row.lease_expires_at is None for row in outbox_app.store.unsent(limit=9)), "anybody may relay them"

    assert Recovery(outbox_app.app.queue_log).run_pass().relayed == 3
    assert outbox_app.published() == ["o-1", "o-2", "o-3"]
    assert left(outbox_app) == []


def test_later_commits_do_not_overtake_messages_left_behind(outbox_app: OutboxApp) -> None:
    publisher = Publisher.of(outbox_app.app.queue_log)
    with outbox_app.broken_broker():
        commit(outbox_app, "o-1")
    commit(outbox_app, "o-2")
    assert outbox_app.published() == [], "the broker is left in peace for a second"
    publisher._not_before = 0.0  # a second later
    commit(outbox_app, "o-3")
    assert outbox_app.published() == ["o-1", "o-2", "o-3"]
    commit(outbox_app, "o-4")
    assert outbox_app.published() == ["o-4"]
    assert left(outbox_app) == []


def test_the_pauses_grow_and_end(outbox_app: OutboxApp) -> None:
    publisher = Publisher.of(outbox_app.app.queue_log)
    pauses: list[float] = []
    with outbox_app.broken_broker():
        for number in range(8):
            publisher._not_before = 0.0
            commit(outbox_app, f"o-{number}")
            pauses.append(publisher._not_before - time.monotonic())
    assert pauses == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0], abs=0.9)
    publisher._not_before = 0.0
    commit(outbox_app, "last")
    assert outbox_app.published() == [*(f"o-{number}" for number in range(8)), "last"]
    with outbox_app.broken_broker():
        commit(outbox_app, "another")
    assert publisher._not_before - time.monotonic() <= 1.0, "they begin with the first again"


def test_a_relay_leaves_alone_what_its_recorder_is_publishing(
    outbox_app: OutboxApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the message if the other relay has not done so in time."""
    monkeypatch.setattr(Publisher, "publish", lambda *_: None)  # the process has died after its commit
    commit(outbox_app, "o-1", "o-2")
    relayed = relay(outbox_app.app.queue_log)
    assert relayed.published == 0
    assert 0 < relayed.in_flight <= 5.0

    steps = list(Recovery(outbox_app.app.queue_log).passes(in_flight=True))

    assert sum(step.relayed for step in steps) == 2
    assert outbox_app.published() == ["o-1", "o-2"]


def slowly(monkeypatch: pytest.MonkeyPatch, began: threading.Event, go_on: threading.Event) -> None:
    """Make each publication wait once in the middle."""
    publish = IdempotentTask.publish

    def slow(task: IdempotentTask, *args: Any, **options: Any) -> Any:
        began.set()
        assert go_on.wait(30.0)
        return publish(task, *args, **options)

    monkeypatch.setattr(IdempotentTask, "publish", slow)


@pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)
def test_one_relay_at_a_time_publishes(outbox_app: OutboxApp, monkeypatch: pytest.MonkeyPatch) -> None:
    with outbox_app.broken_broker():
        commit(outbox_app, *(f"o-{number}" for number in range(5)))
    began, go_on = threading.Event(), threading.Event()
    slowly(monkeypatch, began, go_on)
    first = threading.Thread(target=relay, args=(outbox_app.app.queue_log,))
    first.start()
    assert began.wait(30.0)
    monkeypatch.setattr(relaying, "no_fork", threading.Lock)  # or it would wait for its turn in this process
    second = relay(outbox_app.app.queue_log)
    go_on.set()
    first.join()
    assert (second.published, second.in_flight > 0) == (0, True)
    assert outbox_app.published() == [f"o-{number}" for number in range(5)]


def test_many_relays_at_once_publish_each_message_once_and_in_order(outbox_app: OutboxApp) -> None:
    orders = [f"o-{number:03}" for number in range(700)]
    with outbox_app.broken_broker(), outbox():
        for order in orders:
            outbox_app.app.tasks["charge"].delay(order)
    threads = [
        threading.Thread(target=relay, args=(outbox_app.app.queue_log,), kwargs={"at_most": 1e9}) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(
        lambda: relay(outbox_app.app.queue_log, at_most=1e9).in_flight == 0, timeout=30.0, describe="the last relay"
    )
    assert outbox_app.published() == orders


def test_a_relay_that_dies_in_the_midst_leaves_it_to_the_next(
    outbox_app: OutboxApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "RELAY_LEASE", 1.0)
    with outbox_app.broken_broker():
        commit(outbox_app, "o-1", "o-2", "o-3")

    class Died(BaseException):
        pass

    publish = IdempotentTask.publish

    def die_at_the_second(task: IdempotentTask, args: Any, kwargs: Any, **options: Any) -> Any:
        if options["message_id"] == "o-2":
            raise Died
        return publish(task, args, kwargs, **options)

    with monkeypatch.context() as dying:
        dying.setattr(IdempotentTask, "publish", die_at_the_second)
        dying.setattr(outbox_app.store, "relayed", lambda *_, **__: None)
        with pytest.raises(Died):
            relay(outbox_app.app.queue_log)
    assert outbox_app.published() == ["o-1"]
    wait_until(lambda: relay(outbox_app.app.queue_log).published, timeout=30.0, describe="the end of its lease")
    # A copy too many of the first, which its claim absorbs.
    assert outbox_app.published() == ["o-1", "o-2", "o-3"]


def test_a_broker_that_takes_some_is_not_given_them_again(
    outbox_app: OutboxApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = IdempotentTask.publish
    taken: list[str] = []

    def take_two(task: IdempotentTask, args: Any, kwargs: Any, **options: Any) -> Any:
        if len(taken) == 2:
            raise ConnectionError("no more")
        taken.append(options["message_id"])
        return publish(task, args, kwargs, **options)

    with monkeypatch.context() as limited:
        limited.setattr(IdempotentTask, "publish", take_two)
        commit(outbox_app, "o-1", "o-2", "o-3", "o-4")
    assert outbox_app.published() == ["o-1", "o-2"]
    assert left(outbox_app) == ["o-3", "o-4"]
    assert relay(outbox_app.app.queue_log).published == 2
    assert outbox_app.published() == ["o-3", "o-4"]


def test_an_unrecorded_publication_is_repeated(outbox_app: OutboxApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> None:
        raise StoreUnavailableError("no answer")

    with monkeypatch.context() as down:
        down.setattr(outbox_app.store, "relayed", silent)
        commit(outbox_app, "o-1")
    assert outbox_app.published() == ["o-1"]
    wait_until(
        lambda: relay(outbox_app.app.queue_log).published,
        timeout=30.0,
        describe="the end of its right to publish",
    )
    assert outbox_app.published() == ["o-1"]


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_the_lease_of_a_recorder_does_not_keep_a_consumer_from_claiming(
    outbox_app: OutboxApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    from celery_idempotent.core.records import Claimed, NewMessage

    monkeypatch.setattr(Publisher, "publish", lambda *_: None)
    commit(outbox_app, "o-1")
    row = outbox_app.there("charge", "o-1")
    assert row.lease_left > 0
    claimed = outbox_app.store.claim(NewMessage(row.key, row.task_id), worker="w", lease=60.0, grace=0.0)
    assert isinstance(claimed, Claimed)
    before = outbox_app.there("charge", "o-1")
    outbox_app.store.relayed([row.key], published=False)
    outbox_app.store.relayed([row.key], published=True)
    assert outbox_app.there("charge", "o-1").lease_expires_at == before.lease_expires_at
