"""Tasks with message ids of their own and with each of the producer's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celery import Celery, Task

from celery_idempotent import by_arguments
from tests.support.ledger import Ledger

__all__ = ["register"]


def by_day(order_id: str, day: str) -> str:
    """One message for each order and day."""
    return f"day:{day}:{order_id}"


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register the tasks ``order*``, which return what they were told and differ in their options."""

    def order(self: Task, order_id: str, amount: int = 1) -> dict[str, Any]:
        with ledger.run(self):
            return {"order": order_id, "amount": amount}

    def option(name: str, **options: Any) -> None:
        app.task(order, base=base, bind=True, name=name, **options)

    option("order", message_id="order:{order_id}")
    option("order.raise", message_id="order:{order_id}", on_duplicate="raise")
    option("order.loose", message_id="order:{order_id}", fingerprint=False)
    option("order.window", message_id="order:{order_id}", unique_for=1.0)
    option("order.arguments", message_id=by_arguments())
    option("untyped", typing=False)

    @app.task(base=base, bind=True, name="order.daily", message_id=by_day)
    def daily(self: Task, order_id: str, day: str) -> str:
        with ledger.run(self):
            return f"{order_id} on {day}"

    @app.task(
        base=base, bind=True, name="order.nested", message_id=by_arguments("order.id", exclude=("now", "order.seen?"))
    )
    def nested(self: Task, order: dict[str, Any], now: float = 0.0) -> Any:
        with ledger.run(self):
            return [order["id"], now]

    @app.task(base=base, bind=True, name="order.alone", message_id=by_arguments(exclude="*"))
    def alone(self: Task, mark: str = "") -> str:
        with ledger.run(self):
            return mark

    @app.task(base=base, bind=True, name="order.again", message_id="order:{order_id}", resubmit_failed=True)
    def again(self: Task, order_id: str, flag: str) -> str:
        """Fail until the file ``flag`` is there."""
        with ledger.run(self):
            if not Path(flag).exists():
                raise ValueError("not yet")
            return f"{order_id} at last"

    @app.task(base=base, bind=True, name="calls_another")
    def calls_another(self: Task, order_id: str) -> dict[str, Any]:
        """Call another guarded task as a function, twice, and tell of the requests that the two of them saw."""
        with ledger.run(self):
            another = app.tasks["tells_request"]
            return {"mine": self.request.id, "theirs": [another(), another()]}

    @app.task(base=base, bind=True, name="nests")
    def nests(self: Task, message_id: str) -> list[int]:
        """Send another message twice; in eager mode it runs inside of this body."""
        with ledger.run(self):
            results = [app.tasks["add"].apply_async((1, 2), message_id=message_id) for _ in range(2)]
            return [result.get(disable_sync_subtasks=False) for result in results]

    @app.task(base=base, bind=True, name="calls_itself", fingerprint=False)
    def calls_itself(self: Task, message_id: str, by_apply: bool = False) -> list[Any]:
        """Send the message that this body is running for, and tell what came of it."""
        with ledger.run(self):
            call = self.apply if by_apply else self.apply_async
            result = call((message_id, by_apply), message_id=message_id)
            return [getattr(result, "duplicate", False), result.state, type(result.result).__name__]

    @app.task(base=base, bind=True, name="stubbed", fingerprint=False, max_retries=5)
    def stubbed(self: Task, stub: object) -> object:
        """Retry once, and return what it was called with."""
        with ledger.run(self):
            if self.request.retries < 1:
                raise self.retry(countdown=0)
            return stub

    @app.task(base=base, bind=True, name="tells_request")
    def tells_request(self: Task) -> dict[str, Any]:
        return {"id": self.request.id, "called_directly": bool(self.request.called_directly)}

    @app.task(base=base, bind=True, name="factorial")
    def factorial(self: Task, n: int) -> int:
        """Call itself as a function."""
        with ledger.run(self):
            return 1 if n <= 1 else n * int(self(n - 1))
