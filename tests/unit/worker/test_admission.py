"""Admission of a delivery, on a store in memory that goes silent at the worst moments."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery
from celery.app.task import Context

from celery_idempotent import IdempotentTask, QueueLog, SQLStore, StoreUnavailableError
from celery_idempotent.core.records import Claim, Duplicate, Inserted, MessageKey, NewMessage, Row, Status
from celery_idempotent.message.header import Header
from celery_idempotent.message.serialization import encode_message, encode_result
from celery_idempotent.worker.admission import admit
from celery_idempotent.worker.run_state import Claimed, Replayed

KEY, OWN = MessageKey("m", "task"), MessageKey("first", "task")


class SilentStore(SQLStore):
    """A store in memory that gives no answer to the next so many records or reads."""

    records = reads = 0

    def record(self, message: NewMessage) -> Inserted | Duplicate:
        if self.records:
            self.records -= 1
            raise self._nothing()
        return super().record(message)

    def find(self, key: MessageKey) -> Row | None:
        if self.reads:
            self.reads -= 1
            raise self._nothing()
        return super().find(key)

    def _nothing(self) -> StoreUnavailableError:
        error = StoreUnavailableError("gone")
        error.unsent = True
        return error


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[SilentStore]:
    monkeypatch.setattr("celery_idempotent.core.store_retry.time.sleep", lambda _: None)
    store = SilentStore("sqlite://")
    yield store
    store.close()


@pytest.fixture
def task(store: SilentStore) -> IdempotentTask:
    app = Celery("admission", set_as_current=False, broker="memory://", backend="disabled://")
    QueueLog(app, store=store)

    @app.task(base=IdempotentTask, name="task", shared=False)
    def task() -> None: ...

    bound: IdempotentTask = app.tasks["task"]
    return bound


def copy_of_the_first(store: SQLStore) -> Context:
    message = encode_message((), {}, {"task_id": "first", "message_id": "m"}, serializer="json")
    store.record(NewMessage(KEY, "first", queue="q", message=message))
    headers = Header("m", "task", "copy", copied=True, original_task_id="first").write(None)
    return Context(id="copy", retries=0, args=[], kwargs={}, headers=headers, properties={"message_id": "m"})


@pytest.mark.parametrize("silent", ["reads", "records"])
def test_a_copy_keeps_its_claim_if_the_store_goes_silent_after_it(
    task: IdempotentTask, store: SilentStore, silent: str
) -> None:
    """The claim stands: taken for somebody else's, it would hold its own message until its lease runs out."""
    request = copy_of_the_first(store)
    setattr(store, silent, 2)

    run = admit(task, request)

    assert (type(run.state), run.header.original_id, getattr(store, silent)) == (Claimed, "first", 0)
    claimed, own = store.find(KEY), store.find(OWN)
    assert claimed is not None
    assert run.claim is not None
    assert (claimed.status, claimed.token) == (Status.PROCESSING, run.claim.token) == (Status.PROCESSING, 1)
    assert own is not None
    assert (own.status, own.task_id, own.queue, own.message) == (Status.PENDING, "first", "q", claimed.message)
    run.detach()


def test_a_copy_runs_although_the_first_message_is_unreadable(
    task: IdempotentTask, store: SilentStore, caplog: pytest.LogCaptureFixture
) -> None:
    request = copy_of_the_first(store)
    store.withdraw(KEY, task_id="first")
    store.record(NewMessage(KEY, "first", message=b"application/x-nothing;binary\n"))

    run = admit(task, request)

    assert isinstance(run.state, Claimed)
    assert store.find(OWN) is None
    assert "cannot be kept" in caplog.text
    run.detach()


def test_a_claim_lost_in_a_silence_is_not_kept(
    task: IdempotentTask, store: SilentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker has taken the message over and ended it by the time that the store answers again."""
    request = copy_of_the_first(store)
    task.backend = Celery("results", set_as_current=False, backend="cache+memory://").backend
    record = store.record

    def lose_the_claim(message: NewMessage) -> Inserted | Duplicate:
        monkeypatch.setattr(store, "record", record)
        claimed = store.find(KEY)
        assert claimed is not None
        assert store.expire(Claim(KEY, claimed.token))
        taken = store.take_over(claimed, task_id="copy", worker="other", lease=60.0, attempt=0)
        assert taken is not None
        assert store.complete(taken.claim, result=encode_result(task.app, 5))
        raise store._nothing()

    monkeypatch.setattr(store, "record", lose_the_claim)

    run = admit(task, request)

    assert run.state == Replayed(5)
    assert run.claim is None
