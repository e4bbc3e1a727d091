"""What is refused, or combined, when a task is bound to an app."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from celery import Celery, Task
from celery.worker.request import Request

from celery_idempotent import ConfigurationError, IdempotentTask
from celery_idempotent.worker.binding import passes_the_guard
from celery_idempotent.worker.request import IdempotentRequest


@pytest.fixture
def app() -> Celery:
    return Celery("binding", set_as_current=False, broker="memory://", idempotent_store="sqlite://")


class OwnRequest(Request):  # type: ignore[misc]
    """A user's, which is also found by its path."""


def nothing() -> None: ...


def bind(app: Celery, *bases: type[Task], body: Any = None, name: str = "bound", **attributes: Any) -> Task:
    base = type("Base", bases, {"abstract": True, **attributes})
    return app.task(base=base, name=name, shared=False, lazy=False)(body or nothing)


def orders(mixin: type[Any]) -> list[tuple[type[Any], ...]]:
    return [(mixin, IdempotentTask), (IdempotentTask, mixin)]


# -- bodies ------------------------------------------------------------------------------------------------------------


async def coroutine() -> None: ...


async def asynchronous_generator() -> AsyncIterator[int]:
    yield 1


def generator() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("body", [coroutine, asynchronous_generator])
def test_an_async_body_is_refused(app: Celery, body: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"task bound: Celery calls `async def \w+` but never awaits it"):
        bind(app, IdempotentTask, body=body)


def test_a_generator_is_refused(app: Celery) -> None:
    with pytest.raises(ConfigurationError, match=r"task bound: generator\(\) is a generator"):
        bind(app, IdempotentTask, body=generator)


def test_an_async_run_of_a_class_is_refused(app: Celery) -> None:
    class ClassBased(IdempotentTask):
        name = "class-based"

        async def run(self) -> None: ...

    with pytest.raises(ConfigurationError, match="task class-based: Celery calls `async def run`"):
        app.register_task(ClassBased())


def test_an_async_call_is_refused(app: Celery) -> None:
    async def call(self: Task) -> None: ...

    with pytest.raises(ConfigurationError, match="Celery calls `async def call` but never awaits it"):
        bind(app, IdempotentTask, __call__=call)


@pytest.mark.parametrize("bases", orders(type("Calls", (Task,), {"__call__": lambda self: self.run()})))
def test_a_call_of_the_tasks_own_may_run_any_body(app: Celery, bases: tuple[type[Any], ...]) -> None:
    assert passes_the_guard(type(bind(app, *bases, body=coroutine)), "__call__")


def test_a_bound_task_may_be_bound_again(app: Celery) -> None:
    task = bind(app, IdempotentTask, Request=OwnRequest)
    bound = dict(vars(type(task)))

    task.bind(app)

    assert vars(type(task))["__call__"] is bound["__call__"]
    assert task.Request is bound["Request"]


# -- the worker's side -------------------------------------------------------------------------------------------------


def test_the_request_is_ours(app: Celery) -> None:
    assert bind(app, IdempotentTask).Request == "celery_idempotent.worker.request:IdempotentRequest"


@pytest.mark.parametrize("given", [OwnRequest, f"{__name__}:OwnRequest", f"{__name__}.OwnRequest"], ids=str)
def test_a_request_of_the_users_own_is_combined_with_ours(app: Celery, given: Any) -> None:
    mixin = type("Mixin", (Task,), {"abstract": True, "Request": given})
    every: list[tuple[type[Any], ...]] = [(IdempotentTask,), *orders(mixin)]
    for number, bases in enumerate(every):
        task = bind(app, *bases, name=str(number), **({} if number else {"Request": given}))
        assert issubclass(task.Request, IdempotentRequest)
        assert task.Request.__mro__.index(IdempotentRequest) < task.Request.__mro__.index(OwnRequest)


def test_a_request_that_derives_from_ours_stays(app: Celery) -> None:
    class Ours(IdempotentRequest): ...

    assert bind(app, IdempotentTask, Request=Ours).Request is Ours


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (object, r"object is not a Request: derive it from celery\.worker\.request\.Request"),
        (42, r"task bound: Request is 42: give a class, or the path of one"),
        (type("Slotted", (Request,), {"__slots__": ("one",)}), None),
    ],
)
def test_another_request_is_refused_unless_it_can_be_combined(app: Celery, given: Any, said: str | None) -> None:
    if said is None:
        assert issubclass(bind(app, IdempotentTask, Request=given).Request, IdempotentRequest)
    else:
        with pytest.raises(ConfigurationError, match=said):
            bind(app, IdempotentTask, Request=given)


def test_an_unimportable_request_class_raises_when_used(app: Celery) -> None:
    task = bind(app, IdempotentTask, Request="nowhere:Request")
    with pytest.raises(ConfigurationError, match=r"task bound: Request is 'nowhere:Request', which cannot be imported"):
        _ = task.Request


@pytest.mark.parametrize("bases", orders(type("Batching", (Task,), {"Strategy": lambda *_: None})))
def test_a_strategy_of_anothers_is_refused(app: Celery, bases: tuple[type[Any], ...]) -> None:
    with pytest.raises(ConfigurationError, match="task bound: Batching replaces Celery's Strategy"):
        bind(app, *bases)
