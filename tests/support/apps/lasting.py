"""Tasks that last: longer than their lease, longer than their worker."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import Any

from celery import Celery, Task

from tests.support.ledger import Ledger
from tests.support.waiting import wait_until

__all__ = ["register"]


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks ``last*``, which run until the test makes the file ``gate``, and those that are worse."""

    def last(self: Task, gate: str, value: Any = None) -> Any:
        with ledger.run(self):
            wait_until(Path(gate).exists, timeout=100.0, describe=f"the gate {gate}")
            return value

    app.task(last, base=base, bind=True, name="last.late", acks_late=True, reject_on_worker_lost=True)
    app.task(last, base=base, bind=True, name="last.late.long", acks_late=True, reject_on_worker_lost=True, lease=600)
    app.task(last, base=base, bind=True, name="last.early")
    app.task(last, base=base, bind=True, name="last.early.long", lease=600)

    @app.task(base=base, bind=True, name="last.retry", acks_late=True)
    def last_retry(self: Task, gate: str) -> int:
        with ledger.run(self):
            wait_until(Path(gate).exists, timeout=100.0, describe=f"the gate {gate}")
            if not self.request.retries:
                raise self.retry(countdown=0)
            return int(self.request.retries)

    @app.task(base=base, bind=True, name="last.gil", acks_late=True)
    def last_gil(self: Task, seconds: float) -> str:
        """Sleep without letting go of the interpreter: no thread of this process does anything meanwhile."""
        with ledger.run(self):
            # A PyDLL keeps the GIL through the call.
            ctypes.PyDLL(None).usleep(ctypes.c_uint(int(seconds * 1_000_000)))
            return "awake"

    @app.task(base=base, bind=True, name="poison", acks_late=True, reject_on_worker_lost=True, lease=600)
    def poison(self: Task) -> None:
        """Take the pool's process along every time."""
        with ledger.run(self):
            os.kill(os.getpid(), signal.SIGKILL)
