"""Tasks that retry, for the acceptance tests; see :mod:`tests.support.apps.scenarios`."""

from __future__ import annotations

from celery import Celery, Task
from celery.exceptions import Retry

from celery_idempotent import by_arguments
from tests.support.apps.scenarios import noted
from tests.support.ledger import Ledger
from tests.support.waiting import wait_until

__all__ = ["register"]


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks ``retried``, ``hurried`` and ``changing``."""

    @app.task(base=base, bind=True, name="retried", message_id="retried:{key}", max_retries=5)
    def retried(self: Task, key: str, times: int, countdown: float) -> str:
        with noted(ledger, self, key):
            if self.request.retries < times:
                raise self.retry(countdown=countdown)
            return f"{key} after {self.request.retries} retries"

    @app.task(base=base, bind=True, name="hurried", message_id="hurried:{key}", max_retries=1)
    def hurried(self: Task, key: str) -> None:
        """Its retry is through before it has left its own body."""
        with noted(ledger, self, key):
            if self.request.retries:
                raise ValueError(f"{key} failed at last")
            try:
                self.retry(countdown=0)
            except Retry:
                wait_until(lambda: self.AsyncResult(self.request.id).state == "FAILURE", describe="the retry's end")
                raise

    @app.task(base=base, bind=True, name="changing", message_id=by_arguments(), unique_for=1.0)
    def changing(self: Task, key: str, seen: list[int]) -> list[int]:
        """Change an argument in place, and retry with another."""
        with noted(ledger, self, key):
            seen.append(self.request.retries)
            if self.request.retries < 2:
                raise self.retry(args=(key, [*seen, 100]), countdown=0)
            return seen
