"""Tasks that fail the first time, to be run again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from celery import Celery, Task

from tests.support.apps.outcomes import first
from tests.support.ledger import Ledger
from tests.support.waiting import wait_until

__all__ = ["register"]


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register ``flaky``, ``flaky.parent``, ``flaky.lost`` and ``flaky.stuck``, which call ``child``, and ``fail.tracked``, which always fails."""

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

    @app.task(base=base, bind=True, name="flaky.stuck", lease=3600, acks_late=True, reject_on_worker_lost=True)
    def stuck(self: Task, name: str, flag: str, killed: str) -> str:
        """Call a child; the first time be stuck until somebody ends this process, and the second time end it."""
        with ledger.run(self):
            ledger.note("end", self, detail=app.tasks["child"].delay(f"{name}:stuck").id)
            if first(flag):
                wait_until(Path(f"{flag}.never").exists, timeout=100.0, describe="nothing")
            if first(killed):
                os.kill(os.getpid(), signal.SIGKILL)
            return name
