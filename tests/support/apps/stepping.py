"""Tasks that take steps, and die between and inside of them; and tasks that are asked what became of a message."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery, Task

from celery_idempotent import Done
from celery_idempotent.core.records import Row
from tests.support.ledger import Ledger
from tests.support.provider import Provider
from tests.support.waiting import wait_until

__all__ = ["POINTS", "register"]

#: Where a body may die at a step: before it is taken, after its effect and before it is kept, and after it.
POINTS = ("before", "inside", "after")


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks ``steps.*`` and ``asked.*``."""
    _that_step(app, base, ledger)
    _that_are_asked(app, base, ledger)


def _that_step(app: Celery, base: type[Task], ledger: Ledger) -> None:
    late = {"base": base, "bind": True, "acks_late": True, "reject_on_worker_lost": True}

    def five(self: Any, directory: str, dies: str, with_key: bool = True) -> list[Any]:
        """Charge five times; the first process that comes to a point dies there."""
        provider = Provider(directory)
        die = _death(directory, dies)

        def charge(number: int, key: str | None) -> Any:
            charged = provider.charge(f"line {number}", key)
            die(f"inside {number}")
            return charged

        with ledger.run(self):
            charges = []
            for number in range(5):
                name = f"charge {number}"
                die(f"before {number}")
                charges.append(self.step(name, charge, number, self.step_key(name) if with_key else None))
                die(f"after {number}")
            return charges

    app.task(**late, name="steps.five")(five)
    app.task(**late, name="steps.atomic", atomic=True)(five)

    @app.task(**late, name="steps.retried", max_retries=9)
    def retried(self: Any, directory: str) -> Any:
        """Charge, and retry twice."""
        with ledger.run(self):
            charged = self.step("charge", Provider(directory).charge, "retried")
            if self.request.retries < 2:
                raise self.retry(countdown=0)
            return charged

    @app.task(**late, name="steps.pages")
    def pages(self: Any, directory: str, page: int) -> Any:
        """Charge for a page, and replace itself by the next."""
        with ledger.run(self):
            charged = self.step("charge", Provider(directory).charge, f"page {page}", self.step_key("charge"))
            return charged if page == 2 else self.replace(self.s(directory, page + 1))

    @app.task(**late, name="steps.gated")
    def gated(self: Any, directory: str, gate: str) -> Any:
        """Charge, wait for the gate, and charge again."""
        provider = Provider(directory)

        def wait() -> str:
            wait_until(Path(gate).exists, timeout=100.0, describe=f"the gate {gate}")
            return "open"

        with ledger.run(self):
            self.step("first", provider.charge, "first")
            self.step("gate", wait)
            return self.step("second", provider.charge, "second")

    @app.task(base=base, bind=True, name="steps.limited", soft_time_limit=1)
    def limited(self: Any, directory: str) -> Any:
        """Take so long in a step that its soft limit strikes."""
        from celery.exceptions import SoftTimeLimitExceeded

        def never() -> None:
            wait_until(lambda: False, timeout=100.0, describe="the limit")

        with ledger.run(self):
            self.step("first", Provider(directory).charge, "first")
            try:
                self.step("never", never)
            except SoftTimeLimitExceeded:
                return "limited"


def _death(directory: str, dies: str) -> Callable[[str], None]:
    def die(point: str) -> None:
        if point != dies:
            return
        try:
            (Path(directory) / "died").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    return die


def _that_are_asked(app: Celery, base: type[Task], ledger: Ledger) -> None:
    def ask(self: Any, row: Row) -> Any:
        """Answer what the file says, which the message names."""
        directory = Path(self.request.args[0])
        with (directory / "asked").open("a") as asked:
            asked.write(f"{row.key.message_id} {row.worker}\n")
        answer = (directory / "answer").read_text()
        found = Provider(directory).find(self.step_key("charge"))
        return Done(found) if answer == "done" else answer

    def charge(self: Any, directory: str) -> Any:
        with ledger.run(self):
            return self.step("charge", Provider(directory).charge, "asked", self.step_key("charge"))

    options = {"base": base, "bind": True, "on_abandoned": ask}
    app.task(**options, name="asked.late", acks_late=True)(charge)
    app.task(**options, name="asked.early", acks_late=False)(charge)

    @app.task(**options, name="asked.dying")
    def dying(self: Any, directory: str) -> Any:
        """Charge, and die before that is kept."""
        with ledger.run(self):
            Provider(directory).charge("asked", self.step_key("charge"))
            os.kill(os.getpid(), signal.SIGKILL)
