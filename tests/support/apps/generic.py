"""Tasks for most tests; each notes in the ledger when its body starts and ends."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from celery import Celery, Task

from tests.support.ledger import Ledger
from tests.support.waiting import wait_until

__all__ = ["register"]


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks ``add``, ``echo``, ``slow``, ``gated``, ``fail``, ``retry_returned``, ``retry_n`` and ``retry_late``."""

    @app.task(base=base, bind=True, name="add")
    def add(self: Task, left: int, right: int) -> int:
        with ledger.run(self):
            return left + right

    @app.task(base=base, bind=True, name="echo")
    def echo(self: Task, value: Any = None) -> Any:
        with ledger.run(self):
            return value

    @app.task(base=base, bind=True, name="slow")
    def slow(self: Task, seconds: float, value: Any = None) -> Any:
        """Take some time. Where the test decides how long, use ``gated``."""
        with ledger.run(self):
            time.sleep(seconds)
            return value

    @app.task(base=base, bind=True, name="gated")
    def gated(self: Task, gate: str, value: Any = None) -> Any:
        """Run until the test makes the file ``gate``."""
        with ledger.run(self):
            wait_until(Path(gate).exists, timeout=100.0, describe=f"the gate {gate}")
            return value

    @app.task(base=base, bind=True, name="fail")
    def fail(self: Task, text: str = "as told") -> None:
        with ledger.run(self):
            raise ValueError(text)

    @app.task(base=base, bind=True, name="retry_returned", max_retries=None)
    def retry_returned(self: Task, times: int) -> Any:
        """Retry so many times, by what is returned."""
        with ledger.run(self):
            if self.request.retries < times:
                return self.retry(countdown=0, throw=False)
            return self.request.retries

    @app.task(base=base, bind=True, name="retry_n", max_retries=None)
    def retry_n(self: Task, times: int, countdown: float = 0.0) -> int:
        """Retry so many times, then return the number of retries."""
        with ledger.run(self):
            if self.request.retries < times:
                raise self.retry(countdown=countdown)
            return int(self.request.retries)

    @app.task(base=base, bind=True, name="retry_late", acks_late=True)
    def retry_late(self: Task) -> None:
        """Ask for a retry when the message has expired."""
        with ledger.run(self):
            until = datetime.fromisoformat(self.request.expires)
            wait_until(lambda: datetime.now(UTC) > until, timeout=20.0, describe="the end of its time")
            raise self.retry(countdown=0)
