"""Tasks that wait for a file and then end as their arguments say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celery import Celery, Task

from tests.support.ledger import Ledger
from tests.support.waiting import wait_until

__all__ = ["register"]


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks ``ends``, ``ends.atomic`` and ``late``."""

    @app.task(base=base, bind=True, name="ends", max_retries=None)
    def ends(self: Task, gate: str, how: str) -> str:
        """Run until the test makes the file ``gate``; then succeed, fail, or retry once and succeed."""
        with ledger.run(self):
            wait_until(Path(gate).exists, timeout=100.0, describe=f"the gate {gate}")
            if how == "fail":
                raise ValueError(how)
            if how == "retry" and self.request.retries == 0:
                raise self.retry(countdown=0)
            return how

    @app.task(base=base, bind=True, name="ends.atomic", atomic=True)
    def ends_atomically(self: Task, gate: str) -> int:
        """The same in a transaction, and succeed."""
        with ledger.run(self):
            number: int = self.connection.exec_driver_sql("SELECT 1").scalar_one()
            wait_until(Path(gate).exists, timeout=100.0, describe=f"the gate {gate}")
            return number

    @app.task(base=base, bind=True, name="late", acks_late=True)
    def late(self: Task, value: Any = None) -> Any:
        """Acknowledged after it ran."""
        with ledger.run(self):
            return value
