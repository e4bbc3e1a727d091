"""Tasks with ``on_success``, ``on_failure`` and ``after_return``, of their own or of a mixin on either side of the base, and one that adds to its chord."""

from __future__ import annotations

import os
import signal
from typing import Any

from celery import Celery, Task

from tests.support.apps.outcomes import first
from tests.support.ledger import Ledger

__all__ = ["CLASSES", "register"]

#: The tasks ``handled.<class>``.
CLASSES = ("first", "last", "own")


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register them. A handler notes itself as it begins and as it ends."""

    class Mailer:
        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            ledger.note("start", self, detail="on_success")
            if retval == "killed" and first(args[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            ledger.note("end", self, detail="on_success")

        def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            ledger.note("end", self, detail="on_failure")

        def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            ledger.note("end", self, detail="after_return")

    class MixinFirst(Mailer, base):  # type: ignore[misc]
        abstract = True

    class MailingTask(Mailer, Task):  # type: ignore[misc]
        abstract = True

    # A plain task cannot have its own base before another one.
    bases = (MailingTask,) if base is Task else (base, MailingTask)
    MixinLast = type("MixinLast", bases, {"abstract": True})  # noqa: N806 - it is a class

    class Own(MixinFirst):
        abstract = True

        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            super().on_success(retval, task_id, args, kwargs)

    for name, cls in zip(CLASSES, (MixinFirst, MixinLast, Own), strict=True):

        @app.task(base=cls, bind=True, name=f"handled.{name}", acks_late=True, reject_on_worker_lost=True)
        def body(self: Task, outcome: str = "success", flag: str = "") -> str:
            ledger.note("start", self)
            if outcome == "failure":
                raise ValueError("as told")
            return outcome

    @app.task(base=base, bind=True, name="adds", acks_late=True, reject_on_worker_lost=True)
    def adds(self: Task, name: str, flag: str, count: int) -> str:
        """Add parts to its chord, and be killed then, the first time."""
        ledger.note("start", self, detail=name)
        for number in range(count):
            self.add_to_chord(app.tasks["child"].si(f"{name}.{number}"))
        if first(flag):
            os.kill(os.getpid(), signal.SIGKILL)
        return name
