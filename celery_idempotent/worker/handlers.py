"""A task's own ``on_success``, ``on_failure`` and ``after_return``: people send e-mails there, so a copy must not call them again.

Celery calls them for every delivery that has an outcome, also for a copy that is answered with the first one. They are wrapped in the class: Celery keeps
the bound methods once it has built a task's tracer, and the main process of a worker calls them as well.

``on_success`` and ``on_failure`` are called once per message. ``on_success`` is waited for as a callback is: a worker that dies in it leaves a recovery
point, and the next one calls it once more. A worker that dies in ``on_failure`` has ended the message already. ``after_return`` is called once per attempt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from celery import Task

from celery_idempotent.errors import AlreadyFailedError, AlreadyProcessingError
from celery_idempotent.worker.run import Run
from celery_idempotent.worker.run_state import HandedOn, Replayed

if TYPE_CHECKING:
    from celery_idempotent.producer.guarded import Guarded

__all__ = ["guard_handlers", "inherited"]

#: What marks a handler that is wrapped. Tools that wrap it again (``functools.wraps``) keep the mark.
_MARK = "idempotent_handler"


def guard_handlers(cls: type[Task]) -> None:
    """Wrap the handlers that a class has of its user's, wherever they stand among its bases."""
    for name, once in (("on_success", _on_success), ("on_failure", _on_failure), ("after_return", _after_return)):
        handler = getattr(cls, name)
        if handler is not getattr(Task, name) and not hasattr(handler, _MARK):
            wrapped = once(vars(cls).get(name) or inherited(cls, name))
            setattr(wrapped, _MARK, True)
            setattr(cls, name, wrapped)


def inherited(cls: type, name: str) -> Callable[..., Any]:
    """Return what a class has from its bases, looked up at each call: a tool may replace it there later."""

    @wraps(getattr(cls, name))
    def hook(self: Guarded, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(cls, self), name)(*args, **kwargs)

    return hook


def _on_success(handler: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(handler)
    def on_success(self: Guarded, *args: Any, **kwargs: Any) -> Any:
        run = Run.of(self.request_stack.top)
        if run is None:
            return handler(self, *args, **kwargs)
        if isinstance(run.state, (Replayed, HandedOn)):
            return None
        try:
            answer = handler(self, *args, **kwargs)
        except Exception:
            run.dispatched()  # as far as it will ever get
            raise
        run.dispatched()
        return answer

    return on_success


def _on_failure(handler: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(handler)
    def on_failure(self: Guarded, exc: BaseException, *args: Any, **kwargs: Any) -> Any:
        return None if _is_anothers(self, exc) else handler(self, exc, *args, **kwargs)

    return on_failure


def _after_return(handler: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(handler)
    def after_return(self: Guarded, status: str, retval: Any, *args: Any, **kwargs: Any) -> Any:
        run = Run.of(self.request_stack.top)
        replayed = run is not None and isinstance(run.state, Replayed)
        return None if replayed or _is_anothers(self, retval) else handler(self, status, retval, *args, **kwargs)

    return after_return


def _is_anothers(task: Guarded, outcome: object) -> bool:
    """Return whether this is the outcome of another delivery, of which the caller of a copy is told."""
    request = task.request_stack.top  # none in a worker's main process
    refused = request is not None and Run.of(request) is None
    return refused and isinstance(outcome, (AlreadyFailedError, AlreadyProcessingError))
