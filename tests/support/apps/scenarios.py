"""The tasks of the acceptance tests: every body that starts is noted under the key it was called with.

Two runs of one body can be told apart by what they return, so that "the same value" means "the same run".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery, Task
from celery.exceptions import Ignore

from celery_idempotent import by_arguments
from tests.support.ledger import Ledger
from tests.support.waiting import wait_until

__all__ = ["UnbuildableError", "noted", "register"]


class UnbuildableError(Exception):
    """What ``type(e)(*e.args)`` and ``pickle`` cannot build again: it takes two arguments and keeps one."""

    def __init__(self, code: int, *, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


@contextmanager
def noted(ledger: Ledger, task: Task, key: str) -> Iterator[None]:
    """Note the start and the end of a body under a key."""
    ledger.note("start", task, detail=key)
    try:
        yield
    except BaseException:
        ledger.note("raise", task, detail=key)
        raise
    ledger.note("end", task, detail=key)


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks; with Celery's own class as ``base`` their options mean nothing."""

    def run(task: Task, key: str, gate: str | None) -> str:
        with noted(ledger, task, key):
            if gate is not None:
                wait_until(Path(gate).exists, timeout=100.0, describe=f"the gate {gate}")
            return f"{key} by {task.request.hostname}, run {uuid4().hex}"

    @app.task(base=base, bind=True, name="once")
    def once(self: Task, key: str, gate: str | None = None) -> str:
        """Known by its task id, or by the id that the call gives."""
        return run(self, key, gate)

    @app.task(base=base, bind=True, name="order", message_id="order:{key}")
    def order(self: Task, key: str, gate: str | None = None) -> str:
        """Known by its key, so that the caller may call again."""
        return run(self, key, gate)

    @app.task(base=base, bind=True, name="order_again", message_id="order:{key}", resubmit_failed=True)
    def order_again(self: Task, key: str) -> str:
        """Known by its key, and free to be sent again once it has failed."""
        return run(self, key, None)

    @app.task(base=base, bind=True, name="quiet", ignore_result=True)
    def quiet(self: Task, key: str, gate: str | None = None) -> None:
        """Return a value; the result is not kept."""
        run(self, key, gate)

    @app.task(base=base, bind=True, name="receive")
    def receive(self: Task, value: Any, key: str) -> Any:
        """Return a callback, the next step of a chain, or a chord's body: passes on what it is given."""
        with noted(ledger, self, key):
            return value

    @app.task(base=base, bind=True, name="priced", message_id=by_arguments())
    def priced(self: Task, key: str, amount: Any = 1, *, currency: str = "EUR") -> str:
        with noted(ledger, self, key):
            return f"{amount!r} {currency}, run {uuid4().hex}"

    @app.task(base=base, bind=True, name="brittle", message_id="brittle:{key}")
    def brittle(self: Task, key: str) -> None:
        with noted(ledger, self, key):
            raise UnbuildableError(7, text="cannot be rebuilt")

    class Ignoring(Task):  # type: ignore[misc]
        """What lock packages do with a copy of a running task: drop it, for it is running."""

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            if ledger.starts(task_id=task_id):
                raise Ignore("it is running")

    @app.task(base=Ignoring, bind=True, name="ignoring")
    def ignoring(self: Task, key: str, gate: str | None = None) -> str:
        return run(self, key, gate)
