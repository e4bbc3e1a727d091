"""A shop at night, for the screenshots of Flower's page: its tasks do what the call says."""

from __future__ import annotations

from pathlib import Path

from celery import Celery, Task

from tests.support.ledger import Ledger
from tests.support.waiting import wait_until

__all__ = ["CardDeclinedError", "register"]


class CardDeclinedError(Exception):
    """The card is no good."""


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register ``shop.charge``, ``shop.ship``, ``shop.notify`` and ``reports.export``."""

    @app.task(base=base, name="shop.charge", message_id="order:{order_id}")
    def charge(order_id: str, amount: int, down: bool = False, declined: bool = False) -> str:
        if down:
            raise ConnectionError("payments.example:443: timed out after 10 s")
        if declined:
            raise CardDeclinedError(f"order {order_id}: the bank said no")
        return f"charged {amount}"

    @app.task(base=base, name="shop.ship", message_id="parcel:{order_id}", on_abandoned="fail")
    def ship(order_id: str) -> str:
        return f"label for {order_id}"

    @app.task(base=base, name="shop.notify")
    def notify(order_id: str) -> None:
        return None

    @app.task(base=base, name="reports.export", message_id="export:{month}")
    def export(month: str, gate: str) -> str:
        wait_until(Path(gate).exists, timeout=100.0, describe=f"the gate {gate}")
        return f"{month}.csv"
