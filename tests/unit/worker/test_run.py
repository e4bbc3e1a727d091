"""One guarded run on a store in memory: how each end of a body is written, and what a lost claim changes."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from kombu.exceptions import EncodeError, OperationalError

from celery_idempotent import IdempotentTask, QueueLog, SQLStore, StoreUnavailableError
from celery_idempotent.core.decision import Call
from celery_idempotent.core.records import (
    Claim,
    Claimed,
    MessageKey,
    NewMessage,
    NoResultReason,
    ProcessedStatus,
    Row,
    Status,
)
from celery_idempotent.message.header import Header
from celery_idempotent.message.serialization import decode_result
from celery_idempotent.producer.prepared import PreparedCall
from celery_idempotent.producer.send import Sending
from celery_idempotent.worker import run_state
from celery_idempotent.worker.delivery import describe, waited_on, worker_label
from celery_idempotent.worker.late_retry import retry_stored
from celery_idempotent.worker.perform import perform
from celery_idempotent.worker.run import Run

KEY = MessageKey("m", "task")


class SilentStore(SQLStore):
    """A store in memory that gives no answer to the next so many questions."""

    silent = 0

    def complete(self, claim: Claim, **kwargs: Any) -> bool:
        if self.silent:
            self.silent -= 1
            raise StoreUnavailableError("gone")
        return super().complete(claim, **kwargs)


@pytest.fixture
def store() -> Iterator[SilentStore]:
    store = SilentStore("sqlite://")
    yield store
    store.close()


@pytest.fixture
def task(store: SilentStore) -> IdempotentTask:
    app = Celery("run", set_as_current=False, broker="memory://", backend="disabled://")
    QueueLog(app, store=store)

    @app.task(base=IdempotentTask, name="task", shared=False)
    def task() -> None: ...

    bound: IdempotentTask = app.tasks["task"]
    return bound


@pytest.fixture
def run(task: IdempotentTask, store: SilentStore) -> Run:
    """Return a run that has claimed its message."""
    return claimed(task, store)


def claimed(task: IdempotentTask, store: SQLStore, **request: Any) -> Run:
    run = delivered(task, **request)
    store.record(run.message)
    answer = store.claim(run.message, worker="w", lease=60.0, grace=30.0)
    assert isinstance(answer, Claimed)
    run.move_to(run_state.Claimed(answer.claim))
    return run


def delivered(task: IdempotentTask, **request: Any) -> Run:
    """Return a run that has claimed nothing yet."""
    message = NewMessage(KEY, "task-id", attempt=0)
    context = Context(id="task-id", retries=0, args=[], kwargs={}, **request)
    return Run(task, context, message, Header.new(KEY, "task-id"))


def row(store: SQLStore) -> Row:
    found = store.find(KEY)
    assert found is not None
    return found


def raising(error: BaseException) -> Any:
    def body() -> None:
        raise error

    return body


class TestAProcessThatSlept:
    """Stopped between the claim and the body, and woken after the lease."""

    def test_a_body_whose_claim_was_lost_meanwhile_does_not_run(self, run: Run, store: SQLStore) -> None:
        run.asked -= 100.0
        store.expire(run.held_claim)
        assert store.take_over(row(store), task_id="task-id", worker="another", lease=60.0, attempt=0)
        with pytest.raises(Ignore):
            perform(run, lambda: pytest.fail("the body ran"))

    def test_a_body_whose_claim_still_stands_runs(self, run: Run) -> None:
        run.asked -= 100.0
        assert perform(run, lambda: 5) == 5


class TestTheEndOfABody:
    @pytest.mark.parametrize("value", [None, 0, False, [], {"a": 1}])
    def test_a_value_is_kept_and_the_message_done(self, run: Run, store: SQLStore, value: object) -> None:
        assert perform(run, lambda: value) is value

        assert (row(store).status, row(store).processed_status) == (Status.DONE, ProcessedStatus.SUCCESS)
        assert row(store).result is not None
        assert decode_result(run.task.app, row(store).result or b"") == value
        assert isinstance(run.state, run_state.Finished)

    def test_a_value_that_cannot_be_kept_breaks_nothing(self, run: Run, store: SQLStore) -> None:
        value = object()
        assert perform(run, lambda: value) is value
        assert (row(store).processed_status, row(store).result) == (ProcessedStatus.SUCCESS, None)

    def test_a_value_that_is_not_wanted_is_not_kept(self, task: IdempotentTask, store: SQLStore) -> None:
        type(task).keep_result = False
        run = claimed(task, store)
        perform(run, lambda: 5)
        assert (row(store).processed_status, row(store).result) == (ProcessedStatus.SUCCESS, None)

    @pytest.mark.parametrize("waits", [{"callbacks": [{}]}, {"chain": [{}]}, {"chord": {"task": "t"}}], ids=repr)
    def test_a_value_that_something_waits_for_is_a_recovery_point_first(
        self, task: IdempotentTask, store: SQLStore, waits: dict[str, Any]
    ) -> None:
        run = claimed(task, store, **waits)

        perform(run, lambda: 5)

        assert (row(store).status, row(store).processed_status) == (Status.PROCESSING, ProcessedStatus.SUCCESS)
        run.dispatched()
        assert (row(store).status, row(store).processed_status) == (Status.DONE, ProcessedStatus.SUCCESS)
        assert decode_result(task.app, row(store).result or b"") == 5

    def test_an_error_is_a_failure(self, run: Run, store: SQLStore) -> None:
        with pytest.raises(ValueError, match="no such card"):
            perform(run, raising(ValueError("no such card")))
        assert (row(store).status, row(store).processed_status) == (Status.DONE, ProcessedStatus.FAILURE)
        assert row(store).error == "ValueError: no such card"

    def test_ignore_is_a_success_without_a_result(self, run: Run, store: SQLStore) -> None:
        with pytest.raises(Ignore):
            perform(run, raising(Ignore()))
        assert (row(store).processed_status, row(store).error) == (ProcessedStatus.SUCCESS, NoResultReason.IGNORED)

    def test_reject_is_a_failure(self, run: Run, store: SQLStore) -> None:
        with pytest.raises(Reject):
            perform(run, raising(Reject("poison", requeue=False)))
        assert (row(store).status, row(store).processed_status) == (Status.DONE, ProcessedStatus.FAILURE)
        assert "Reject" in (row(store).error or "")

    def test_reject_with_requeue_gives_the_message_back(self, run: Run, store: SQLStore) -> None:
        with pytest.raises(Reject):
            perform(run, raising(Reject("later", requeue=True)))
        assert (row(store).status, row(store).attempt) == (Status.PENDING, 0)

    def test_a_retry_raised_by_hand_waits_for_the_next_attempt(self, run: Run, store: SQLStore) -> None:
        with pytest.raises(Retry):
            perform(run, raising(Retry("again")))
        assert (row(store).status, row(store).attempt) == (Status.PENDING, 1)
        assert isinstance(run.state, run_state.HandedOn)


class TestALostClaim:
    @pytest.fixture
    def taken_over(self, run: Run, store: SQLStore) -> Run:
        """Return a run whose message another owner has by now."""
        assert run.claim is not None
        assert store.expire(run.claim)
        assert store.take_over(row(store), task_id="task-id", worker="other", lease=60.0, attempt=0)
        return run

    @pytest.mark.parametrize(
        "end",
        [
            lambda: 5,
            raising(ValueError("no")),
            raising(Ignore()),
            raising(Retry()),
            raising(Reject("no", requeue=True)),
        ],
        ids=["value", "error", "ignore", "retry", "reject"],
    )
    def test_ends_the_run_without_a_word(
        self, taken_over: Run, store: SQLStore, end: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = row(store)

        with pytest.raises(Ignore, match="token 1"):
            perform(taken_over, end)

        after = row(store)
        assert (after.status, after.token, after.worker, after.result) == (Status.PROCESSING, 2, "other", before.result)
        assert isinstance(taken_over.state, run_state.Lost)
        assert "its lease ran out before the body ended" in caplog.text

    def test_hands_nothing_on(self, taken_over: Run, store: SQLStore) -> None:
        assert taken_over.hand_on(NewMessage(KEY, "task-id", attempt=1, delay=0.0)) is False
        assert row(store).attempt == 0


class TestWithoutABody:
    def test_a_replay_returns_its_value(self, task: IdempotentTask) -> None:
        run = delivered(task)
        run.move_to(run_state.Replayed(0))
        assert perform(run, lambda: pytest.fail("the body ran")) == 0

    def test_an_unguarded_run_writes_nothing(self, task: IdempotentTask, store: SQLStore) -> None:
        run = delivered(task)
        store.record(run.message)
        assert perform(run, lambda: 5) == 5
        assert row(store).status is Status.PENDING


class TestWhileTheStoreIsSilent:
    def test_the_outcome_waits_for_it(self, run: Run, store: SilentStore, caplog: pytest.LogCaptureFixture) -> None:
        store.silent = 2
        assert perform(run, lambda: 5) == 5
        assert row(store).processed_status is ProcessedStatus.SUCCESS
        assert "cannot record a success for task[m], asking again until the store answers: gone" in caplog.text
        # A handler may send a record to another process, with its arguments.
        assert [pickle.loads(pickle.dumps(record.args)) for record in caplog.records]

    def test_run_goes_on(self, task: IdempotentTask, store: SilentStore, caplog: pytest.LogCaptureFixture) -> None:
        task.app.conf.idempotent_on_store_error = "run"
        run = claimed(task, store)
        store.silent = 1
        assert perform(run, lambda: 5) == 5
        assert row(store).status is Status.PROCESSING
        assert "could not record a success for task[m], so a copy of it may run again: gone" in caplog.text

    def test_raise_raises(self, task: IdempotentTask, store: SilentStore) -> None:
        task.app.conf.idempotent_on_store_error = "raise"
        run = claimed(task, store)
        store.silent = 1
        with pytest.raises(StoreUnavailableError, match="gone"):
            perform(run, lambda: 5)

    def test_an_eager_caller_gets_the_error(self, task: IdempotentTask, store: SilentStore) -> None:
        run = claimed(task, store, is_eager=True)
        store.silent = 1
        with pytest.raises(StoreUnavailableError, match="gone"):
            perform(run, lambda: 5)


def test_a_soft_time_limit_that_strikes_after_the_body_changes_nothing(
    run: Run, store: SilentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, strikes = store.complete, iter([SoftTimeLimitExceeded()])

    def interrupted(claim: Claim, **kwargs: Any) -> bool:
        for strike in strikes:
            raise strike
        return complete(claim, **kwargs)

    monkeypatch.setattr(store, "complete", interrupted)
    assert perform(run, lambda: 5) == 5
    assert row(store).processed_status is ProcessedStatus.SUCCESS


class TestDescribe:
    class OurError(Exception):
        pass

    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (ValueError("no"), "ValueError: no"),
            (KeyError("k"), "KeyError: 'k'"),
            (ValueError(), "ValueError: "),
        ],
    )
    def test_type_and_text(self, error: Exception, text: str) -> None:
        assert describe(error) == text

    def test_a_nested_class(self) -> None:
        assert describe(self.OurError("no")).endswith("TestDescribe.OurError: no")

    def test_a_long_text_is_cut(self) -> None:
        assert len(describe(ValueError("x" * 100_000))) == 4000

    def test_an_error_that_cannot_say_what_it_is(self) -> None:
        class MuteError(Exception):
            def __str__(self) -> str:
                raise RuntimeError("no words")

        assert describe(MuteError()).endswith("MuteError, whose text raises RuntimeError")


class TestWorkerLabel:
    def test_of_this_process(self) -> None:
        assert worker_label("host") == f"host:{os.getpid()}"

    def test_of_a_child(self) -> None:
        assert worker_label("host", 7) == "host:7"

    def test_outside_a_worker(self) -> None:
        assert worker_label(None) == f"local:{os.getpid()}"

    def test_each_thread_has_its_own(self) -> None:
        labels: list[tuple[str, int]] = []
        for _ in range(2):
            thread = threading.Thread(target=lambda: labels.append((worker_label("host"), threading.get_ident())))
            thread.start()
            thread.join()
        assert all(label == f"host:{os.getpid()}:{ident}" for label, ident in labels)

    def test_a_long_host_name_keeps_what_tells_processes_apart(self) -> None:
        assert len(worker_label("h" * 300, 123)) == 255
        assert worker_label("h" * 300, 123).endswith("h:123")


@pytest.mark.parametrize(
    ("request_", "waits"),
    [
        ({}, False),
        ({"callbacks": []}, False),
        ({"callbacks": [{}]}, True),
        ({"chain": [{}]}, True),
        ({"chord": {"a": 1}}, True),
    ],
)
def test_waited_on(request_: dict[str, Any], waits: bool) -> None:
    assert waited_on(Context(**request_)) is waits


class TestARetryStoredLate:
    """Celery stores RETRY after it has published the next attempt, which may have ended by then."""

    @pytest.fixture
    def handed_on(self, task: IdempotentTask, store: SQLStore) -> Run:
        task.backend = Celery("results", set_as_current=False, backend="cache+memory://").backend
        run = claimed(task, store)
        assert run.hand_on(NewMessage(KEY, "task-id", attempt=1))
        again = store.claim(NewMessage(KEY, "task-id", attempt=1), worker="w2", lease=60.0, grace=30.0)
        assert isinstance(again, Claimed)
        assert store.fail(again.claim, error="ValueError: the reason")
        task.backend.store_result("task-id", Retry(), "RETRY")
        return run

    def test_the_end_that_it_hid_is_stored_again(self, handed_on: Run) -> None:
        retry_stored(handed_on)

        backend = handed_on.task.backend
        assert backend.get_state("task-id") == "FAILURE"
        assert "ValueError: the reason" in str(backend.get_result("task-id"))

    def test_an_attempt_that_has_yet_to_store_its_end_is_waited_for(self, handed_on: Run) -> None:
        """Its row is done before its result is stored, and what it stores is the error itself."""
        backend = handed_on.task.backend
        attempt = threading.Timer(0.3, backend.store_result, ("task-id", ValueError("the reason"), "FAILURE"))
        attempt.start()

        retry_stored(handed_on)

        attempt.join()
        assert isinstance(backend.get_result("task-id"), ValueError)


class TestARetryThatIsNotPublished:
    """The row has moved on to the next attempt by then."""

    def send_on(self, run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
        monkeypatch.setattr(type(run.task), "publish", lambda *_, **__: raising(error)())
        message = NewMessage(KEY, "task-id", attempt=1)
        return Sending(PreparedCall(run.task, (), {}, {}, message, run.header, Call(own=True), run)).send()

    def test_because_the_broker_is_away_is_left_to_recovery(
        self, run: Run, store: SQLStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.send_on(run, monkeypatch, OperationalError("refused")).id == "task-id"
        assert [(left.attempt, left.published_at) for left in store.unsent(limit=9)] == [(1, None)]

    def test_because_the_process_has_to_end_is_left_to_recovery(
        self, run: Run, store: SQLStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What billiard raises on SIGTERM, wherever the body is."""
        with pytest.raises(SystemExit):
            self.send_on(run, monkeypatch, SystemExit(-241))
        assert [(left.attempt, left.published_at) for left in store.unsent(limit=9)] == [(1, None)]

    def test_because_it_cannot_be_encoded_is_a_failure(
        self, run: Run, store: SQLStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(EncodeError):
            self.send_on(run, monkeypatch, EncodeError("no JSON"))
        assert (row(store).status, row(store).processed_status) == (Status.DONE, ProcessedStatus.FAILURE)
