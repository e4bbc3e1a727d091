"""Has a worker answer for its metrics, as the page "Monitor" says; the port is in its log."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task
from celery.signals import worker_ready

from celery_idempotent.contrib import prometheus
from tests.support.ledger import Ledger

__all__ = ["register"]


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register nothing."""


@worker_ready.connect
def serve(**_: Any) -> None:
    prometheus.serve(0, address="127.0.0.1")
