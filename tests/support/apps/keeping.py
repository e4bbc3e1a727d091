"""Tasks whose outcomes are hard to keep: large results, and errors in many characters."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task

from tests.support.ledger import Ledger

__all__ = ["register"]


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks ``large``, ``large.atomic``, ``large.retry`` and ``wail``."""

    def large(self: Task, size: int) -> str:
        with ledger.run(self):
            if getattr(self, "atomic", None):
                assert self.connection is not None
            return "x" * size

    late = {"acks_late": True, "bind": True, "base": base}
    app.task(large, name="large", **late)
    app.task(large, name="large.atomic", atomic=True, **late)

    @app.task(name="large.retry", max_retries=1, **late)
    def large_retry(self: Task, size: int, text: str = "") -> int:
        """Retry with a large argument."""
        with ledger.run(self):
            if not text:
                raise self.retry(args=(size, "x" * size), countdown=0)
            return len(text)

    @app.task(name="wail", **late)
    def wail(self: Task, text: str) -> Any:
        with ledger.run(self):
            raise ValueError(text)
