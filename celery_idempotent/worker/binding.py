"""Put the guard around a task's class when the task is bound to an app, before the class is used.

A worker calls the same methods as for a plain task with the same bases, in the same order, and the guard runs before all of them. So the
place of a mixin among the bases does not matter, nor whether its ``__call__`` and ``before_start`` call ``super()``. A class that cannot
be guarded is refused.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any

from celery import Task
from celery.exceptions import Ignore
from celery.utils.imports import symbol_by_name

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.producer.unrecorded import is_unrecorded
from celery_idempotent.worker.admission import admit
from celery_idempotent.worker.come_again import come_again
from celery_idempotent.worker.handlers import inherited
from celery_idempotent.worker.perform import perform
from celery_idempotent.worker.run import Passage, Run
from celery_idempotent.worker.run_state import Lost
from celery_idempotent.worker.turned_off import run_unguarded

if TYPE_CHECKING:
    from celery.app.task import Context
    from celery.worker.request import Request

    from celery_idempotent.producer.guarded import Guarded

__all__ = ["REQUEST", "guard", "passes_the_guard"]

logger = logging.getLogger("celery_idempotent")

#: The path of the worker's request class; processes that only send do not import it.
REQUEST = "celery_idempotent.worker.request:IdempotentRequest"

#: The attribute of a guarded function. Tools that wrap it by ``functools.wraps`` keep it.
_MARK = "idempotent_guard"


def guard(cls: type[Task]) -> None:
    """Put the guard before a class's hooks, unless it is there already.

    Raises:
        ConfigurationError: The class cannot be guarded; the text says why and what to do.
    """
    _refuse_strategy(cls)
    if not passes_the_guard(cls, "__call__"):
        _refuse_unawaited(cls)
    _combine_request(cls)
    for name, guarded in (("__call__", _guarded_call), ("before_start", _guarded_start)):
        if not passes_the_guard(cls, name):
            _put_before(cls, name, guarded)


def passes_the_guard(cls: type, name: str) -> bool:
    """Return whether the guard runs before a class's ``__call__`` or ``before_start``."""
    return hasattr(getattr(cls, name), _MARK)


# -- hooks -------------------------------------------------------------------------------------------------------------


def _put_before(cls: type, name: str, guarded: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    hook = guarded(vars(cls).get(name) or inherited(cls, name))
    setattr(hook, _MARK, True)
    setattr(cls, name, hook)


def _guarded_start(start: Callable[..., None]) -> Callable[..., None]:
    """Decide on the delivered message before ``before_start``, which duplicates do not reach."""

    @wraps(start)
    def before_start(self: Guarded, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        if not passes_the_guard(cls, "__call__"):
            logger.warning(
                "something replaced %s.__call__ after the task was bound; the guard is put before it again",
                cls.__name__,
            )
            _put_before(cls, "__call__", _guarded_call)
        request = self.request_stack.top
        if Run.of(request) is None:
            if request.id is None:  # the caller passed the id to the hooks only
                request.id = args[0] if args else kwargs.get("task_id")
            _admit(self, request)
        start(self, *args, **kwargs)

    return before_start


def _admit(task: Guarded, request: Context) -> Run:
    return run_unguarded(task, request) if is_unrecorded(task) else admit(task, request)


def _guarded_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """Guard ``__call__`` in a traced run. Direct calls, also those from the body, run unguarded."""

    @wraps(call)
    def __call__(self: Guarded, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - it is one
        request = self.request_stack.top
        if request is None or request.called_directly:
            return call(self, *args, **kwargs)
        run = Run.of(request) or _admit(self, request)  # if something kept Celery from calling before_start
        if run.passage is not Passage.OUTSIDE:
            return call(self, *args, **kwargs)
        # A worker makes Celery's own `__call__` push the delivery's request. An eager run does not, and an atomic body may run several
        # times. Our `push_request` covers all cases, so switch Celery's off.
        request._protected = 1  # noqa: SLF001

        def body() -> Any:
            return _awaited(self, call(self, *args, **kwargs))

        try:
            return perform(run, body)
        except Ignore:
            again = run.limits.without(partial(come_again, run)) if isinstance(run.state, Lost) else None
            if again is None:
                raise
            raise again from None

    return __call__


# -- bodies that are not awaited ---------------------------------------------------------------------------------------


def _refuse_unawaited(cls: type[Task]) -> None:
    """Refuse a body that Celery would call without running it, unless the task's own ``__call__`` may run it."""
    calls = [vars(owner)["__call__"] for owner in cls.__mro__[: cls.__mro__.index(Task)] if "__call__" in vars(owner)]
    runs = next((call for call in calls if not hasattr(call, _MARK)), cls.run)
    name = getattr(runs, "__name__", "run")
    if inspect.iscoroutinefunction(runs) or inspect.isasyncgenfunction(runs):
        raise ConfigurationError(
            f"task {cls.name}: Celery calls `async def {name}` but never awaits it: make it a `def` that calls asyncio.run(), or give "
            f"the task a `def __call__` that awaits self.run()"
        )
    if inspect.isgeneratorfunction(runs):
        raise ConfigurationError(
            f"task {cls.name}: {name}() is a generator, which Celery calls but never runs: return a value instead of using `yield`"
        )


def _awaited(task: Guarded, value: Any) -> Any:
    """Return a body's result; raise if it still has to be awaited."""
    if not (inspect.isawaitable(value) or inspect.isasyncgen(value)):
        return value
    if inspect.iscoroutine(value):
        value.close()
    raise ConfigurationError(
        f"task {task.name} returned a {type(value).__name__}, which Celery does not await: await it in the body, for instance by asyncio.run()"
    )


# -- the worker's side -------------------------------------------------------------------------------------------------


def _refuse_strategy(cls: type[Task]) -> None:
    strategy = inspect.getattr_static(cls, "Strategy")
    if strategy != Task.Strategy:
        owner = next(owner for owner in cls.__mro__ if "Strategy" in vars(owner))
        raise ConfigurationError(
            f"task {cls.name}: {owner.__name__} replaces Celery's Strategy, so its messages would bypass the guard: remove IdempotentTask or "
            f"{owner.__name__} from the bases of the task"
        )


def _combine_request(cls: type[Task]) -> None:
    """Combine the user's own ``Request`` class with ours, which comes first, whatever the order of the task's bases."""
    given = (vars(owner)["Request"] for owner in cls.__mro__ if "Request" in vars(owner))
    theirs = next((request for request in given if request not in (REQUEST, Task.Request)), None)
    if isinstance(theirs, str):
        cls.Request = _NamedRequest(theirs)
    elif isinstance(theirs, type):
        cls.Request = _combined(theirs)
    elif theirs is not None and not isinstance(theirs, _NamedRequest):
        raise ConfigurationError(f"task {cls.name}: Request is {theirs!r}: give a class, or the path of one")


class _NamedRequest:
    """A ``Request`` given by its path. It is imported and combined with ours when a worker first uses it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __get__(self, task: Guarded | None, owner: type[Task]) -> type[Request]:
        try:
            return _combined(symbol_by_name(self._path))
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(
                f"task {owner.name}: Request is {self._path!r}, which cannot be imported: {error}"
            ) from error


@cache
def _combined(theirs: type) -> type[Request]:
    from celery.worker.request import Request

    from celery_idempotent.worker.request import IdempotentRequest

    if not issubclass(theirs, Request):
        raise ConfigurationError(f"{theirs.__name__} is not a Request: derive it from celery.worker.request.Request")
    if issubclass(theirs, IdempotentRequest):
        return theirs
    try:
        return type(theirs.__name__, (IdempotentRequest, theirs), {"__module__": theirs.__module__})
    except TypeError as error:
        raise ConfigurationError(
            f"{theirs.__name__} cannot be combined with IdempotentRequest ({error}): derive it from celery_idempotent.worker.request.IdempotentRequest"
        ) from error
