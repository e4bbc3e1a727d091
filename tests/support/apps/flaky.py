"""Tasks that fail the first time, for whoever has them run again."""

from __future__ import annotations

import os
import signal
from typing import Any

from celery import Celery, Task

from tests.support.apps.outcomes import first
from tests.support.ledger import Ledger

__all__ = ["register"]


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register ``flaky``, ``flaky.parent`` and ``flaky.lost``, which call ``child``, and ``fail.tracked``, which always fails."""

    @app.task(base=base, bind=True, name="flaky")
    def flaky(self: Task, value: Any, flag: str) -> Any:
        with ledger.run(self):
            if first(flag):
                raise ValueError("the first time")
            return value

    @app.task(base=base, bind=True, name="fail.tracked", track_started=True)
    def tracked(self: Task) -> None:
        with ledger.run(self):
            raise ValueError("as ever")

    @app.task(base=base, bind=True, name="flaky.parent")
    def parent(self: Task, name: str, flag: str) -> list[str]:
        """Call a child, fail the first time, and call another one."""
        with ledger.run(self):
            made = [app.tasks["child"].delay(f"{name}:1").id]
            if first(flag):
                raise ValueError("the first time")
            return [*made, app.tasks["child"].delay(f"{name}:2").id]

    @app.task(base=base, bind=True, name="flaky.lost", acks_late=True, retry_on_worker_lost=True, default_retry_delay=0)
    def lost(self: Task, name: str, killed: str, flag: str) -> str:
        """Call a child; lose the process the first time, fail the second time."""
        with ledger.run(self):
            app.tasks["child"].delay(f"{name}:lost")
            if first(killed):
                os.kill(os.getpid(), signal.SIGKILL)
            if first(flag):
                raise ValueError("the second time")
            return name
