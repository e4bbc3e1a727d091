"""A task that takes a model of pydantic's."""

from typing import Any

from celery import Celery, Task
from pydantic import BaseModel

from tests.support.ledger import Ledger

__all__ = ["Order", "register"]


class Order(BaseModel):
    """An order."""

    number: int


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register ``modelled``."""

    @app.task(base=base, bind=True, name="modelled", pydantic=True, message_id="order:{order[number]}")
    def modelled(self: Any, order: Order) -> int:
        with ledger.run(self):
            return order.number
