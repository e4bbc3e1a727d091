"""Tasks whose bodies call others, and workers that die at a given moment of a dispatch.

A message whose last argument is :func:`deadly` takes the process that publishes it along: just before it is published, or just
after, the first time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any, Literal

from celery import Celery, Task, chain, chord, group, signals

from tests.support.apps.outcomes import first
from tests.support.ledger import Ledger

__all__ = ["KINDS", "deadly", "register"]

Moment = Literal["before", "after"]


def deadly(name: str, moment: Moment, flag: str) -> str:
    """Return the name of a child, with whose publication its publisher dies."""
    return f"{name}|{moment}|{flag}"


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks ``child*``, which note their name, and ``parent*``, which call them."""
    _deaths(app)

    def child(self: Task, *heard: Any) -> Any:
        """Note its last argument."""
        ledger.note("end", self, detail=heard[-1])
        return heard[-1]

    def order(self: Task, name: str) -> str:
        ledger.note("end", self, detail=name)
        return name

    app.task(child, base=base, bind=True, name="child")
    app.task(child, base=base, bind=True, name="child.raise", on_duplicate="raise")
    app.task(order, base=base, bind=True, name="child.order", message_id="child:{name}", on_duplicate="raise")

    @app.task(base=base, bind=True, name="child.fail", resubmit_failed=True)
    def fail(self: Task, name: str) -> None:
        ledger.note("end", self, detail=name)
        raise ValueError(name)

    _parents(app, base, ledger)


def _deaths(app: Celery) -> None:
    def die(moment: Moment) -> Callable[..., None]:
        def published(body: Any = None, **_: Any) -> None:
            # The first protocol's body is a mapping.
            args = body["args"] if isinstance(body, Mapping) else body[0] if body else ()
            told = args[-1] if args else None
            if isinstance(told, str) and f"|{moment}|" in told and first(told.rpartition("|")[2]):
                os.kill(os.getpid(), signal.SIGKILL)

        return published

    for moment, hook in (("before", signals.before_task_publish), ("after", signals.after_task_publish)):
        hook.connect(die(moment), weak=False, dispatch_uid=f"{id(app)} {moment}")  # type: ignore[arg-type]


def _parents(app: Celery, base: type[Task], ledger: Ledger) -> None:
    def parent(self: Task, kind: str, name: str, flag: str = "", retries: int = 0) -> Any:
        """Call the children of a kind; the first time, die then. Afterwards retry so many times."""
        with ledger.run(self):
            dies = bool(flag) and first(flag)
            made = KINDS[kind](app, name, dies)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.request.retries < retries:
                raise self.retry(countdown=0)
            return [result.id for result in made]

    def outlived(name: str, body: Callable[..., Any], **options: Any) -> None:
        # A dead process is handled at once, before its lease ends.
        app.task(body, base=base, bind=True, name=name, lease=3600, acks_late=True, max_retries=None, **options)

    outlived("parent", parent, reject_on_worker_lost=True)
    outlived("parent.retried", parent, retry_on_worker_lost=True, default_retry_delay=0)

    def value(self: Task, name: str, succeeds: bool = True) -> str:
        with ledger.run(self):
            if not succeeds:
                raise ValueError(name)
            return name

    outlived("parent.value", value, reject_on_worker_lost=True)
    outlived("parent.ignored", value, reject_on_worker_lost=True, ignore_result=True)

    @app.task(base=base, bind=True, name="parent.helped")
    def helped(self: Task, name: str) -> list[str]:
        """Have another guarded task, called as a function, call a child too."""
        with ledger.run(self):
            return [*app.tasks["parent.helper"](name), app.tasks["child"].delay(name).id]

    @app.task(base=base, bind=True, name="parent.helper")
    def helper(self: Task, name: str) -> list[str]:
        return [app.tasks["child"].delay(name).id]


# -- what a body calls; each gives the results that its parent returns -------------------------------------------------------

Kind = Callable[[Celery, str, bool], list[Any]]


def _reordered(app: Celery, name: str, dies: bool) -> list[Any]:
    """Call two children; the second time in the other order, after one more."""
    names = [f"{name}:1", f"{name}:2"] if dies else [f"{name}:more", f"{name}:2", f"{name}:1"]
    return [app.tasks["child"].delay(each) for each in names]


def _linked(app: Celery, name: str, _: bool) -> list[Any]:
    child = app.tasks["child"]
    return [child.apply_async((f"{name}:1",), link=[child.s(f"{name}:2"), child.s(f"{name}:2")])]


def _chain(app: Celery, name: str, _: bool) -> list[Any]:
    child = app.tasks["child"]
    last = child.s(f"{name}:3")
    last.link(child.s(f"{name}:4"))
    return [chain(child.s(f"{name}:1"), child.s(f"{name}:2"), last, app=app).delay()]


def _chord(app: Celery, name: str, _: bool) -> list[Any]:
    child = app.tasks["child"]
    return [chord([child.s(f"{name}:1"), child.s(f"{name}:2")], child.s(f"{name}:3"), app=app).delay()]


def _chord_in_chain(app: Celery, name: str, _: bool) -> list[Any]:
    child = app.tasks["child"]
    header = group([child.s(f"{name}:2"), child.s(f"{name}:3")], app=app)
    return [chain(child.s(f"{name}:1"), header, child.s(f"{name}:4"), app=app).delay()]


KINDS: dict[str, Kind] = {
    "one": lambda app, name, _: [app.tasks["child"].delay(name)],
    "three alike": lambda app, name, _: [app.tasks["child"].delay(name) for _ in range(3)],
    "raising": lambda app, name, _: [app.tasks["child.raise"].delay(name)],
    "identified": lambda app, name, _: [app.tasks["child.order"].delay(name)],
    "explicit": lambda app, name, _: [app.tasks["child.raise"].apply_async((name,), message_id=f"explicit:{name}")],
    "failing": lambda app, name, _: [app.tasks["child.fail"].delay(name)],
    "by name": lambda app, name, _: [app.send_task("child", (name,))],
    "reordered": _reordered,
    "linked": _linked,
    "group": lambda app, name, _: list(
        group([app.tasks["child"].s(f"{name}:{n}") for n in (1, 2)], app=app).delay().results
    ),
    "chain": _chain,
    "chord": _chord,
    "chord in a chain": _chord_in_chain,
    "chain of the identified": lambda app, name, _: [
        chain(app.tasks["child"].s(f"{name}:1"), app.tasks["child.order"].si(f"{name}:2"), app=app).delay()
    ],
}
