"""Call a task's own ``on_success``, ``on_failure`` and ``after_return`` only once: people send e-mails there.

Celery calls them for each delivery that has an outcome, also for a copy that gets the first run's result. They are wrapped in the class,
because Celery keeps bound methods in a task's tracer, and a worker's main process calls them too.

``on_success`` and ``on_failure`` are called once per message. If a worker dies in ``on_success``, the recovery point remains, as for a
callback, and the next worker calls it again. If a worker dies in ``on_failure``, the message has already ended. ``after_return`` is called
once per attempt.
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

#: The attribute of a wrapped handler. Tools that wrap it again by ``functools.wraps`` keep it.
_MARK = "idempotent_handler"


def guard_handlers(cls: type[Task]) -> None:
    """Wrap the user's handlers of a class, from any of its bases."""
    for name, once in (("on_success", _on_success), ("on_failure", _on_failure), ("after_return", _after_return)):
        handler = getattr(cls, name)
        if handler is not getattr(Task, name) and not hasattr(handler, _MARK):
            wrapped = once(vars(cls).get(name) or inherited(cls, name))
            setattr(wrapped, _MARK, True)
            setattr(cls, name, wrapped)


def inherited(cls: type, name: str) -> Callable[..., Any]:
    """Return a method that calls the one of the class's bases. It looks that up at each call, since a tool may replace it later."""

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
            run.dispatched()  # an error here must not make the handler run again
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
    """Return whether this outcome is another delivery's, passed on to the caller of a copy."""
    request = task.request_stack.top  # none in a worker's main process
    refused = request is not None and Run.of(request) is None
    return refused and isinstance(outcome, (AlreadyFailedError, AlreadyProcessingError))
