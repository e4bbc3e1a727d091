"""Bases of a task besides ours, where it is called: what each order of them makes of a run, eagerly and in an atomic body."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task, states
from celery.app import trace
from celery.exceptions import Ignore, Reject

from celery_idempotent import ConfigurationError, IdempotentTask
from celery_idempotent.core.records import MessageKey, NoResultReason, ProcessedStatus, Row, Status
from tests.support.apps import close_app
from tests.support.stores import sqlite_store

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    app = Celery("mixins", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(task_always_eager=True, idempotent_store=sqlite_store(tmp_path))
    yield app
    close_app(app)


class Runs(Task):  # type: ignore[misc]
    """Runs the body itself, as in Flask's documentation."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return ["in a context", self.run(*args, **kwargs)]


class GoesOn(Task):  # type: ignore[misc]
    """Goes on to the next class."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return ["in a context", super().__call__(*args, **kwargs)]


class Owner(Task):  # type: ignore[misc]
    abstract = True
    session = "its own session"

    @property
    def connection(self) -> str:
        return f"the connection of {self.name}"


def both(mixin: type[Task]) -> list[type[Task]]:
    orders: list[tuple[type[Task], ...]] = [(mixin, IdempotentTask), (IdempotentTask, mixin)]
    return [type("Both", bases, {"abstract": True}) for bases in orders]


def row(app: Celery, task: str, message_id: str = "m") -> Row:
    found: Row | None = app.queue_log.store.find(MessageKey(message_id, task))
    assert found is not None
    return found


@pytest.mark.parametrize("base", [*both(Runs), *both(GoesOn)])
def test_an_eager_body_has_the_request_and_the_transaction(app: Celery, base: type[Task]) -> None:
    runs = []

    @app.task(shared=False, base=base, bind=True, name="settle", atomic=True, max_retries=1)
    def settle(self: Any) -> str:
        runs.append(self.request.retries)
        assert self.session.connection() is not None
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        return str(self.request.id)

    result = settle.apply_async(message_id="m")

    assert result.get() == ["in a context", result.id]
    assert settle.apply_async(message_id="m").get() == result.get()
    assert runs == [0, 1]
    assert (row(app, "settle").processed_status, row(app, "settle").token) == (SUCCESS, 2)


@pytest.mark.parametrize("base", both(GoesOn))
def test_a_body_that_calls_itself_has_the_arguments_of_that_call(app: Celery, base: type[Task]) -> None:
    @app.task(shared=False, base=base, bind=True, name="sum", max_retries=1)
    def add_up(self: Any, n: int) -> Any:
        return [n, *self.request.args, *([self(n - 1)] if n else [])]

    assert add_up.delay(1).get() == ["in a context", [1, 1, ["in a context", [0, 0]]]]


def test_a_subclass_of_a_bound_task_is_guarded_once(app: Celery) -> None:
    calls = []

    class First(IdempotentTask):
        name = "first"

        def run(self) -> str:
            return str(self.name)

    class Second(First):
        name = "second"

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(self.name)
            return super().__call__(*args, **kwargs)

    first, second = app.register_task(First()), app.register_task(Second())

    assert [task.apply_async(message_id="m").get() for task in (first, second, first, second)] == [
        "first",
        "second",
    ] * 2
    assert calls == ["second"]
    assert [row(app, name).token for name in ("first", "second")] == [1, 1]


def test_an_annotation_of_the_call_is_guarded(app: Celery) -> None:
    def twice(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: [call(self, *args, **kwargs)] * 2

    app.conf.task_annotations = {"annotated": {"@__call__": twice}}

    @app.task(shared=False, base=IdempotentTask, name="annotated")
    def annotated() -> int:
        return 1

    assert annotated.apply_async(message_id="m").get() == [1, 1]
    assert row(app, "annotated").status is Status.DONE


# -- session and connection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", both(Owner))
def test_a_mixin_keeps_its_session_and_connection(app: Celery, base: type[Task]) -> None:
    @app.task(shared=False, base=base, bind=True, name="own")
    def own(self: Any) -> list[str]:
        return [self.session, self.connection]

    assert own.delay().get() == ["its own session", "the connection of own"]


@pytest.mark.parametrize("base", both(Owner))
def test_an_atomic_task_has_one_session_only(app: Celery, base: type[Task]) -> None:
    with pytest.raises(ConfigurationError, match=r"task own is atomic.*, but Owner has another session: rename that"):
        app.task(shared=False, base=base, name="own", atomic=True, lazy=False)(fails)


# -- the net -----------------------------------------------------------------------------------------------------------


def succeeds(self: Any) -> str:
    return "value"


def fails(self: Any) -> None:
    raise ValueError("as told")


def retries(self: Any) -> str:
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return "at last"


def ignores(self: Any) -> None:
    raise Ignore


def rejects(self: Any) -> None:
    raise Reject("as told", requeue=False)


@pytest.mark.parametrize(
    ("body", "state", "ended"),
    [
        (succeeds, states.SUCCESS, (Status.DONE, SUCCESS, None)),
        (fails, states.FAILURE, (Status.DONE, FAILURE, "ValueError: as told")),
        (retries, states.SUCCESS, (Status.DONE, SUCCESS, None)),
        (ignores, states.IGNORED, (Status.DONE, SUCCESS, NoResultReason.IGNORED)),
        (
            rejects,
            states.REJECTED,
            (Status.DONE, FAILURE, "celery.exceptions.Reject: ('as told', False); rejected before: 0"),
        ),
    ],
)
@pytest.mark.parametrize("atomic", [False, True])
def test_a_run_past_the_guard_ends_as_celery_saw_it(
    app: Celery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    body: Callable[[Any], Any],
    state: str,
    ended: tuple[Any, ...],
    atomic: bool,
) -> None:
    # A tracer that calls `run` itself: such as Celery's was, had it found no `__call__` to call.
    has_custom = trace.task_has_custom
    monkeypatch.setattr(trace, "task_has_custom", lambda task, hook: hook != "__call__" and has_custom(task, hook))
    task = app.task(
        shared=False, base=IdempotentTask, bind=True, name="past", lazy=False, atomic=atomic, max_retries=1
    )(body)

    result = task.apply(message_id="m")

    assert result.state == state
    done = row(app, "past")
    assert (done.status, done.processed_status, done.error) == ended
    assert "past[m] was still claimed when Celery had finished with it, and ends with Celery's state" in caplog.text


def test_a_call_that_was_replaced_is_guarded_again(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    runs = []

    @app.task(shared=False, base=IdempotentTask, bind=True, name="again", lazy=False, atomic=True)
    def again(self: Any) -> int:
        runs.append(self.session)
        return len(runs)

    type(again).__call__ = lambda self, *args, **kwargs: self.run(*args, **kwargs)

    assert [again.apply(message_id="m").get() for _ in range(2)] == [1, 1]
    assert "something replaced again.__call__ after the task was bound" in caplog.text


def test_a_before_start_that_raises_is_a_failure(app: Celery) -> None:
    class Refuses(IdempotentTask):
        abstract = True

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            raise ValueError("not today")

    @app.task(shared=False, base=Refuses, name="refused")
    def refused() -> None: ...

    assert refused.apply(message_id="m").state == states.FAILURE
    assert (row(app, "refused").status, row(app, "refused").error) == (Status.DONE, "ValueError: not today")


# -- bodies that are never awaited -----------------------------------------------------------------------------------------


def test_a_call_of_the_tasks_own_may_await_the_body(app: Celery) -> None:
    class Awaits(IdempotentTask):
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return asyncio.run(self.run(*args, **kwargs))

    runs = []

    @app.task(shared=False, base=Awaits, name="awaited")
    async def awaited(n: int) -> int:
        await asyncio.sleep(0)
        runs.append(n)
        return n

    assert [awaited.apply_async((1,), message_id="m").get() for _ in range(2)] == [1, 1]
    assert runs == [1]


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("ignore_result", [False, True])
def test_a_coroutine_that_a_body_returns_is_a_failure(app: Celery, atomic: bool, ignore_result: bool) -> None:
    async def later() -> None: ...

    returned: list[Any] = []

    @app.task(shared=False, base=IdempotentTask, name="later", atomic=atomic, ignore_result=ignore_result)
    def body() -> Any:
        returned.append(later())
        return returned[0]

    result = body.apply(message_id="m")

    assert result.state == states.FAILURE
    assert inspect.getcoroutinestate(returned[0]) == inspect.CORO_CLOSED
    done = row(app, "later")
    assert (done.status, done.processed_status) == (Status.DONE, FAILURE)
    assert "task later returned a coroutine, which Celery does not await" in str(done.error)
