"""Tasks for a database behind a pooler. Some outlast their lease, so another connection renews it."""

from __future__ import annotations

import time
from typing import Any

from celery import Celery, Task

from celery_idempotent import IdempotentTask
from tests.support.effects import Effect
from tests.support.ledger import Ledger

__all__ = ["LEASE", "register"]

#: Seconds; renewed at a third of it.
LEASE = 6.0


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks ``pooled.plain`` and ``pooled.atomic``."""
    late: dict[str, Any] = {"base": base, "bind": True, "acks_late": True, "reject_on_worker_lost": True}

    @app.task(**late, name="pooled.plain", lease=LEASE)
    def plain(self: Task, name: str, seconds: float = 0.0) -> str:
        with ledger.run(self):
            time.sleep(seconds)
            return name

    @app.task(**late, name="pooled.atomic", lease=LEASE, atomic=True)
    def atomic(self: IdempotentTask, name: str, seconds: float = 0.0) -> str:
        """Have an effect, and take some time before or after it."""
        with ledger.run(self):
            time.sleep(seconds)
            self.session.add(Effect(name=name))
            return name
