"""``with outbox()``: calls that are recorded together and published by one producer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa

from celery_idempotent import (
    DuplicateMessageError,
    MessageMismatchError,
    SQLStore,
    StoreUnavailableError,
    outbox,
)
from celery_idempotent.core.records import Duplicate, Inserted, NewMessage, RowFilter
from celery_idempotent.core.store import Store
from celery_idempotent.producer.current_outbox import current_outbox
from celery_idempotent.producer.relay import relay
from tests.integration.producer.outbox.conftest import OutboxApp
from tests.support.effects import Effect


@pytest.fixture
def inserts() -> Iterator[list[str]]:
    """Every statement that writes to the queue log."""
    executed: list[str] = []

    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith(("INSERT INTO queue_log", "UPDATE queue_log")):
            executed.append(statement.split(maxsplit=1)[0])

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    yield executed
    sa.event.remove(sa.Engine, "before_cursor_execute", note)


def test_a_thousand_calls_are_recorded_by_few_statements(outbox_app: OutboxApp, inserts: list[str]) -> None:
    charge = outbox_app.app.tasks["charge"]
    names = [f"o-{number}" for number in range(1000)]
    with outbox():
        results = [charge.delay(name) for name in names]
        assert outbox_app.published() == []
        assert {result.duplicate for result in results} == {None}

    assert outbox_app.published() == names
    assert inserts == ["INSERT", "UPDATE"] * 2, "of 500 each"
    assert not any(result.duplicate for result in results)
    assert [outbox_app.there("charge", name).task_id for name in names[::100]] == [
        result.id for result in results[::100]
    ]
    assert outbox_app.store.unsent(limit=9) == []


def test_results_know_which_were_duplicates_and_lead_to_the_first(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]
    before = charge.delay("o-2")
    outbox_app.messages()
    with outbox():
        results = [charge.delay(name) for name in ("o-1", "o-2", "o-3", "o-3")]

    assert outbox_app.published() == ["o-1", "o-3"]
    assert [result.duplicate for result in results] == [False, True, False, True]
    assert results[1].id == before.id
    assert results[3].id == results[2].id
    assert [outbox_app.there("charge", name).duplicates for name in ("o-1", "o-2", "o-3")] == [0, 1, 1]


def test_a_refused_call_is_raised_after_the_others_are_published(outbox_app: OutboxApp) -> None:
    outbox_app.app.tasks["strict"].delay("o-1", 1)
    outbox_app.app.tasks["charge"].delay("o-1", 1)
    outbox_app.messages()
    with pytest.raises(ExceptionGroup) as raised, outbox():  # noqa: PT012
        refused = outbox_app.app.tasks["strict"].delay("o-1", 1)
        outbox_app.app.tasks["charge"].delay("o-1", 2)
        sent = outbox_app.app.tasks["charge"].delay("o-2", 1)

    assert [type(error) for error in raised.value.exceptions] == [DuplicateMessageError, MessageMismatchError]
    assert "2 of 3 calls" in str(raised.value)
    assert (refused.duplicate, sent.duplicate) == (True, False)
    assert outbox_app.published() == ["o-2"]


def test_an_error_in_the_block_leaves_nothing(outbox_app: OutboxApp) -> None:
    with pytest.raises(ZeroDivisionError), outbox():  # noqa: PT012
        outbox_app.app.tasks["charge"].delay("o-1")
        raise ZeroDivisionError
    assert outbox_app.row("charge", "o-1") is None
    assert outbox_app.published() == []


class Refusing:
    """A store that refuses in the middle of a batch, as a Redis with full memory does, and perhaps all the rest."""

    def __init__(self, store: SQLStore, patch: pytest.MonkeyPatch, *, after: int, for_good: bool) -> None:
        self._after = after
        self._record_all = store.record_all
        patch.setattr(store, "record_all", self.record_all)
        if for_good:
            patch.setattr(store, "withdraw", self.refuse)

    def record_all(self, messages: Sequence[NewMessage]) -> list[Inserted | Duplicate]:
        few = messages[: self._after]
        self._after -= len(few)
        answers = self._record_all(few)
        return answers if len(few) == len(messages) else self.refuse()

    def refuse(self, *_: object, **__: object) -> Any:
        raise StoreUnavailableError("no room")


@pytest.mark.parametrize("store_url", ["sqlite", "mariadb"], indirect=True)
@pytest.mark.parametrize(
    ("count", "after", "for_good", "told", "left"),
    [
        (400, 100, False, "none of the 400 calls of the batch was sent", 0),
        (700, 600, False, "the first 500 of the 700 calls of the batch were sent, and no others", 500),
        (400, 100, True, "none of the 400 calls of the batch was sent so far, but some of 400 were recorded", 100),
    ],
)
def test_a_batch_refused_midway_reports_what_was_sent(
    outbox_app: OutboxApp,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    after: int,
    for_good: bool,
    told: str,
    left: int,
) -> None:
    outbox_app.app.conf.task_publish_retry = False
    charge = outbox_app.app.tasks["charge"]
    first = charge.delay("o-0")
    outbox_app.messages()
    with monkeypatch.context() as patch:
        Refusing(outbox_app.store, patch, after=after, for_good=for_good)
        with pytest.raises(StoreUnavailableError, match=told), outbox():
            results = [charge.delay(f"o-{number}") for number in range(count)]

    assert outbox_app.there("charge", "o-0").task_id == first.id
    assert len(list(outbox_app.store.rows(RowFilter(limit=1000)))) == max(left, 1)
    sent = outbox_app.published()
    assert len(sent) == (left - 1 if after > 500 else 0)
    assert [result.duplicate for result in results[len(sent) + 1 :]] == [None] * (count - len(sent) - 1)


@pytest.mark.parametrize("fail", [False, True])
def test_a_batch_inside_of_a_batch_is_part_of_it(outbox_app: OutboxApp, fail: bool) -> None:
    charge = outbox_app.app.tasks["charge"]
    with suppress(ZeroDivisionError), outbox():
        charge.delay("o-1")
        with outbox():
            inner = charge.delay("o-2")
        assert (outbox_app.published(), inner.duplicate) == ([], None)
        if fail:
            raise ZeroDivisionError
    assert outbox_app.published() == ([] if fail else ["o-1", "o-2"])
    assert inner.duplicate is (None if fail else False)
    assert (outbox_app.row("charge", "o-2") is None) is fail


def test_a_batch_inside_of_an_outbox_joins_its_transaction(outbox_app: OutboxApp, inserts: list[str]) -> None:
    charge = outbox_app.app.tasks["charge"]
    for end, published in (("rollback", []), ("commit", ["o-1", "o-2", "o-3", "o-4"])):
        with outbox_app.session() as session, outbox(session):
            session.add(Effect(name=end))
            charge.delay("o-1")
            with outbox():
                results = [charge.delay("o-2"), charge.delay("o-3")]
            assert [result.duplicate for result in results] == [False, False]
            charge.delay("o-4")
            assert outbox_app.published() == []
            getattr(session, end)()
        assert outbox_app.published() == published
    assert inserts == ["INSERT"] * 6 + ["UPDATE"]


def test_nothing_is_lost_when_the_broker_takes_nothing(outbox_app: OutboxApp) -> None:
    with outbox_app.broken_broker(), outbox():
        results = [outbox_app.app.tasks["charge"].delay(f"o-{number}") for number in range(3)]
    assert [result.duplicate for result in results] == [False] * 3
    assert relay(outbox_app.app.queue_log).published == 3
    assert outbox_app.published() == ["o-0", "o-1", "o-2"]


@pytest.mark.parametrize("policy", ["retry", "raise", "run"])
@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_store_that_gives_no_answer_is_the_callers_to_know(
    outbox_app: OutboxApp, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    outbox_app.app.conf.update(
        idempotent_on_store_error=policy, task_publish_retry_policy={"max_retries": 1, "interval_start": 0}
    )

    def silent(*_: object, **__: object) -> Any:
        error = StoreUnavailableError("no answer")
        error.unsent = True
        raise error

    for verb in ("record_all", "relayed"):
        assert hasattr(Store, verb)
        monkeypatch.setattr(outbox_app.store, verb, silent)
    if policy == "run":
        with outbox():
            outbox_app.app.tasks["charge"].delay("o-1")
        assert outbox_app.published() == ["o-1"]
    else:
        with pytest.raises(StoreUnavailableError), outbox():
            outbox_app.app.tasks["charge"].delay("o-1")
        assert outbox_app.published() == []
    assert outbox_app.row("charge", "o-1") is None


def test_an_empty_batch_is_nothing(outbox_app: OutboxApp, inserts: list[str]) -> None:
    with outbox():
        pass
    assert inserts == []
    assert current_outbox(outbox_app.app.queue_log) is None
