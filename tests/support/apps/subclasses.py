"""Tasks of classes that users derive, with and without ``super()``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery, Task
from celery.worker.request import Request

from tests.support.apps.outcomes import first
from tests.support.ledger import Ledger

__all__ = ["HOOKS", "register"]

#: Each class, by the name of its tasks.
HOOKS = (
    *("before_start", "before_start.super", "call", "call.super", "flask", "hooks", "hooks.super", "everything"),
    # Mixins, by where they stand among the bases; and what a tool puts in the place of a class's `__call__` once that is guarded.
    *("flask.first", "flask.last", "mixin.first", "mixin.last", "wrapped", "replaced"),
)


class Noting:
    """A mixin that notes each call of its hooks in a file next to the ledger."""

    ledger: Ledger
    name: str

    def note(self, hook: str, task_id: str) -> None:
        with Path(f"{self.ledger.path}.hooks").open("a") as hooks:
            hooks.write(f"{self.name} {task_id} {hook}\n")


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register ``sub.<hook>`` for each of ``HOOKS``, two with a ``Request`` of their own, and one that is a class itself."""
    for name, cls in _classes(base, ledger).items():
        _register_body(app, cls, ledger, f"sub.{name}")
    patch_call(type(app.tasks["sub.wrapped"]), wrap=True)
    patch_call(type(app.tasks["sub.replaced"]), wrap=False)

    class OwnRequest(Request):  # type: ignore[misc]
        """Celery's request, which knows nothing of claims."""

        def on_timeout(self, soft: bool, timeout: float) -> None:
            super().on_timeout(soft, timeout)
            with Path(f"{ledger.path}.hooks").open("a") as hooks:
                hooks.write(f"{self.name} {self.id} on_timeout\n")

    class WithRequest(Task):  # type: ignore[misc]
        abstract = True
        Request = OwnRequest

    _register_body(app, _derive(WithRequest, base), ledger, "sub.request.first", time_limit=5)
    _register_body(app, _derive(base, WithRequest), ledger, "sub.request.last", time_limit=5)

    class ClassBased(base):  # type: ignore[misc]
        name = "sub.class"
        max_retries = 5

        def run(self, outcome: str = "success", flag: str = "") -> str:
            with ledger.run(self):
                return _end(self, outcome, flag)

    app.register_task(ClassBased())


def _classes(base: type[Task], ledger: Ledger) -> dict[str, type[Task]]:
    class WithLedger(Noting, base):  # type: ignore[misc]
        abstract = True

    WithLedger.ledger = ledger

    class BeforeStart(WithLedger):
        abstract = True

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            self.note("before_start", task_id)

    class BeforeStartSuper(WithLedger):
        abstract = True

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            super().before_start(task_id, args, kwargs)
            self.note("before_start", task_id)

    class Call(WithLedger):
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.note("__call__", str(self.request.id))
            return self.run(*args, **kwargs)

    class CallSuper(WithLedger):
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.note("__call__", str(self.request.id))
            return super().__call__(*args, **kwargs)

    class FlaskTask(WithLedger):
        """As Flask's documentation has it, around an application context."""

        abstract = True

        def __call__(self, *args: object, **kwargs: object) -> object:
            with self.app_context():
                return self.run(*args, **kwargs)

        @contextmanager
        def app_context(self) -> Iterator[None]:
            self.note("push", str(self.request.id))
            yield
            self.note("pop", str(self.request.id))

    class Hooks(WithLedger):
        abstract = True

        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            self.note("on_success", task_id)

        def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            self.note("on_failure", task_id)

        def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            self.note("on_retry", task_id)

        def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            self.note("after_return", task_id)

    class HooksSuper(WithLedger):
        abstract = True

        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            super().on_success(retval, task_id, args, kwargs)
            self.note("on_success", task_id)

        def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            super().on_failure(exc, task_id, args, kwargs, einfo)
            self.note("on_failure", task_id)

        def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            super().on_retry(exc, task_id, args, kwargs, einfo)
            self.note("on_retry", task_id)

        def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            super().after_return(status, retval, task_id, args, kwargs, einfo)
            self.note("after_return", task_id)

    class Everything(Hooks):
        """All of them at once, and none with ``super()``."""

        abstract = True

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            self.note("before_start", task_id)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.note("__call__", str(self.request.id))
            return self.run(*args, **kwargs)

    class AppContext(Noting, Task):  # type: ignore[misc]
        """A mixin that runs the body itself."""

        abstract = True

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            self.note("before_start", task_id)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            task_id = str(self.request.id)
            self.note("push", task_id)
            try:
                return self.run(*args, **kwargs)
            finally:
                self.note("pop", task_id)

    class Mixin(Noting, Task):  # type: ignore[misc]
        """A mixin that goes on to the next class."""

        abstract = True
        session = "its own"

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            super().before_start(task_id, args, kwargs)
            self.note(f"before_start with {self.session}", task_id)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.note(f"__call__ with {self.session}", str(self.request.id))
            return super().__call__(*args, **kwargs)

    AppContext.ledger = Mixin.ledger = ledger
    return dict(
        zip(
            HOOKS,
            (
                *(BeforeStart, BeforeStartSuper, Call, CallSuper, FlaskTask, Hooks, HooksSuper, Everything),
                *(_derive(AppContext, base), _derive(base, AppContext), _derive(Mixin, base), _derive(base, Mixin)),
                *(_derive(WithLedger), _derive(WithLedger)),
            ),
            strict=True,
        )
    )


def _derive(*bases: type[Task]) -> type[Task]:
    """Return an abstract class of these bases; of a mixin alone, where the others are Celery's own."""
    return type("Derived", tuple(base for base in bases if base is not Task), {"abstract": True})


def patch_call(cls: type[Task], *, wrap: bool) -> None:
    """Put a ``__call__`` on the class of a bound task, as tools do: around what is there, or in its place."""
    call: Any = cls.__call__ if wrap else lambda self, *args, **kwargs: self.run(*args, **kwargs)

    def patched(self: Task, *args: Any, **kwargs: Any) -> Any:
        self.note("patched", str(self.request.id))
        return call(self, *args, **kwargs)

    cls.__call__ = patched


def _register_body(app: Celery, cls: type[Task], ledger: Ledger, name: str, **options: Any) -> None:
    @app.task(base=cls, bind=True, name=name, max_retries=5, lazy=False, **options)
    def body(self: Task, outcome: str = "success", flag: str = "") -> str:
        with ledger.run(self):
            return _end(self, outcome, flag)


def _end(task: Task, outcome: str, flag: str) -> str:
    """End as told."""
    if outcome == "failure":
        raise ValueError("as told")
    if outcome == "retry" and first(flag):
        raise task.retry(countdown=0)
    if outcome == "hang":
        time.sleep(600)
    return outcome
