"""``on_abandoned`` as a callable: what it is given, what it answers, and what follows."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_idempotent import (
    AlreadyFailedError,
    ConfigurationError,
    Done,
    IdempotentError,
    IdempotentTask,
    QueueLog,
    StoreUnavailableError,
)
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, ProcessedStatus, Row, Status
from celery_idempotent.message.serialization import decode_result
from tests.support.apps import close_app

NAME = "shop.charge"
KEY = MessageKey("m", NAME)


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    app = Celery("asked", set_as_current=False, broker="memory://", backend="cache+memory://")
    app.conf.idempotent_store = f"sqlite:///{tmp_path / 'store.db'}"
    yield app
    close_app(app)


@pytest.fixture
def runs() -> list[str]:
    return []


@pytest.fixture
def charge(app: Celery, runs: list[str]) -> Callable[..., Any]:
    """Make the task with an ``on_abandoned``, whose owner has died."""

    def charge(on_abandoned: Any, **options: Any) -> Any:
        @app.task(base=IdempotentTask, name=NAME, shared=False, on_abandoned=on_abandoned, bind=True, **options)
        def body(self: IdempotentTask, order: str) -> str:
            runs.append(self.step_key("charge"))
            return f"charged {order}"

        message = NewMessage(KEY, "id-1", message=b"message")
        answer = QueueLog.of(app).store.claim(message, worker="gone:1", lease=0.001, grace=0.0)
        assert isinstance(answer, Claimed)
        while row(app).lease_left > 0:
            pass
        return app.tasks[NAME]

    return charge


def row(app: Celery) -> Row:
    found = QueueLog.of(app).store.find(KEY)
    assert found is not None
    return found


def deliver(task: Any, task_id: str = "id-1", **options: Any) -> Any:
    headers = {"idempotent": {"message_id": "m", "task": NAME, "task_id": task_id}}
    return task.apply(("o-1",), task_id=task_id, headers=headers, **options)


def test_it_is_given_the_row(app: Celery, charge: Callable[..., Any]) -> None:
    given: list[Row] = []

    def ask(row: Row) -> str:
        given.append(row)
        return "rerun"

    deliver(charge(ask))
    assert (given[0].key, given[0].worker, given[0].token, given[0].message) == (KEY, "gone:1", 1, b"message")


def test_rerun_runs_it(app: Celery, charge: Callable[..., Any], runs: list[str]) -> None:
    assert deliver(charge(lambda _: "rerun")).get() == "charged o-1"
    assert (row(app).processed_status, row(app).token, len(runs)) == (ProcessedStatus.SUCCESS, 2, 1)


def test_fail_fails_it(app: Celery, charge: Callable[..., Any], runs: list[str]) -> None:
    with pytest.raises(AlreadyFailedError, match="abandoned"):
        deliver(charge(lambda _: "fail")).get()
    assert (row(app).processed_status, row(app).token, runs) == (ProcessedStatus.FAILURE, 1, [])


@pytest.mark.parametrize("value", [None, 0, "", {"charge": 7}], ids=repr)
def test_done_ends_it_with_its_result(app: Celery, charge: Callable[..., Any], runs: list[str], value: Any) -> None:
    """And callbacks go on."""
    heard: list[Any] = []

    @app.task(name="shop.told", shared=False)
    def told(result: Any) -> None:
        heard.append(result)

    task = charge(lambda _: Done(value), keep_result=False)
    app.conf.task_always_eager = True
    assert deliver(task, link=told.s()).get() == value
    found = row(app)
    assert (found.status, found.processed_status, found.token) == (Status.DONE, ProcessedStatus.SUCCESS, 2)
    assert found.result is not None
    assert decode_result(app, found.result) == value
    assert (heard, runs) == ([value], [])


def test_done_is_a_recovery_point_before_its_callbacks_are_sent(app: Celery, charge: Callable[..., Any]) -> None:
    """If this worker dies too, the next one replays it, and does not ask again."""
    asked: list[Row] = []

    class Dying(IdempotentTask):
        abstract = True

        def on_success(self, *_: Any) -> None:
            found = row(app)
            assert (found.status, found.processed_status) == (Status.PROCESSING, ProcessedStatus.SUCCESS)
            if len(asked) == 1 and not self.request.retries:
                asked.append(found)
                raise SystemExit

    def ask(row: Row) -> Done:
        asked.append(row)
        return Done("paid")

    @app.task(base=Dying, name=NAME, shared=False, on_abandoned=ask)
    def body(order: str) -> str:
        raise AssertionError

    store = QueueLog.of(app).store
    assert isinstance(
        store.claim(NewMessage(KEY, "id-1", message=b"m"), worker="gone:1", lease=0.001, grace=0.0), Claimed
    )
    while row(app).lease_left > 0:
        pass
    with pytest.raises(SystemExit):
        deliver(app.tasks[NAME])
    held = row(app)
    from celery_idempotent.core.records import Claim

    assert store.expire(Claim(KEY, held.token))
    assert deliver(app.tasks[NAME]).get() == "paid"
    assert len(asked) == 2
    assert row(app).status is Status.DONE


def test_a_recovery_point_is_not_asked_about(app: Celery, charge: Callable[..., Any]) -> None:
    from celery_idempotent.core.records import Claim
    from celery_idempotent.message.serialization import encode_result

    def ask(_: Row) -> str:
        raise AssertionError

    task = charge(ask)
    assert app.queue_log.store.checkpoint(Claim(KEY, 1), result=encode_result(app, "replayed"))
    assert deliver(task).get() == "replayed"


@pytest.mark.parametrize("answer", [None, "", "retry", True, Done, Status.DONE], ids=repr)
def test_nonsense_changes_nothing(app: Celery, charge: Callable[..., Any], runs: list[str], answer: Any) -> None:
    task = charge(lambda _: answer)
    before = row(app)
    with pytest.raises(ConfigurationError, match=r"let it return 'rerun', 'fail' or Done\(result\)"):
        deliver(task).get()
    after = row(app)
    assert (after.status, after.token, after.worker, runs) == (before.status, before.token, "gone:1", [])


def test_an_error_changes_nothing(app: Celery, charge: Callable[..., Any], runs: list[str]) -> None:
    def ask(_: Row) -> str:
        raise OSError("no answer")

    with pytest.raises(OSError, match="no answer"):
        deliver(charge(ask)).get()
    assert (row(app).status, row(app).token, runs) == (Status.PROCESSING, 1, [])


def test_it_may_be_a_method(app: Celery) -> None:
    class Asking(IdempotentTask):
        abstract = True

        def on_abandoned(self, row: Row) -> Done:
            return Done([self.name, row.key.message_id, self.request.args])

    @app.task(base=Asking, name=NAME, shared=False)
    def body(order: str) -> str:
        raise AssertionError

    _leave(app)
    assert deliver(app.tasks[NAME]).get() == [NAME, "m", ("o-1",)]


def test_it_may_be_a_function_that_takes_the_task(app: Celery, charge: Callable[..., Any]) -> None:
    def ask(self: IdempotentTask, row: Row) -> Done:
        return Done([self.name, row.key.message_id])

    assert deliver(charge(ask)).get() == [NAME, "m"]


def test_it_may_be_the_apps_setting(app: Celery, charge: Callable[..., Any]) -> None:
    app.conf.idempotent_on_abandoned = lambda row: Done(row.key.task_name)
    assert deliver(charge(None)).get() == NAME


def test_it_knows_the_keys_of_the_steps(app: Celery, charge: Callable[..., Any], runs: list[str]) -> None:
    """Under which its provider has the charge; also for a copy under another Celery id."""
    keys: list[str] = []

    def ask(self: IdempotentTask, _: Row) -> str:
        keys.append(self.step_key("charge"))
        return "rerun"

    deliver(charge(ask), task_id="id-2")
    assert keys == runs
    assert len(keys) == 1


def test_it_takes_no_steps(app: Celery, charge: Callable[..., Any]) -> None:
    def ask(self: IdempotentTask, _: Row) -> str:
        self.step("charge", str)
        return "rerun"

    with pytest.raises(IdempotentError, match="the body, which has not begun"):
        deliver(charge(ask)).get()


def test_a_lost_answer_to_the_takeover_does_not_run_it(
    app: Celery, charge: Callable[..., Any], runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store took over and its answer was lost. This delivery finds itself as the owner, and knows that it was done."""
    task = charge(lambda _: Done("paid"))
    store = QueueLog.of(app).store
    take_over, lost = store.take_over, [1]

    def lose(*args: Any, **kwargs: Any) -> Any:
        answer = take_over(*args, **kwargs)
        if lost:
            lost.pop()
            raise StoreUnavailableError("the answer was lost")
        return answer

    monkeypatch.setattr(store, "take_over", lose)
    monkeypatch.setattr("celery_idempotent.worker.admission._Admission.decide", _again)
    assert deliver(task).get() == "paid"
    assert (runs, row(app).status, row(app).token) == ([], Status.DONE, 2)


def _again(admission: Any) -> Any:
    """Decide as in a worker, which asks again."""
    try:
        return admission._admit()
    except StoreUnavailableError:
        return admission._admit()


def _leave(app: Celery) -> None:
    answer = QueueLog.of(app).store.claim(NewMessage(KEY, "id-1"), worker="gone:1", lease=0.001, grace=0.0)
    assert isinstance(answer, Claimed)
    while row(app).lease_left > 0:
        pass


def test_done_is_a_value() -> None:
    assert Done([1]) == Done([1]) != Done([2])
    assert Done() == Done(None)
    assert pickle.loads(pickle.dumps(Done("x"))) == Done("x")
