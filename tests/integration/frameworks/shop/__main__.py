"""A process that places an order and may be killed right after its commit: ``python -m ... [killed]``."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import django

django.setup()

from django.db import transaction  # noqa: E402 - after the set-up

from tests.integration.frameworks.shop.models import Order  # noqa: E402
from tests.integration.frameworks.shop.tasks import charge  # noqa: E402


def place() -> Any:
    order = Order.objects.create(amount=500)
    print(order.pk, flush=True)  # noqa: T201 - the test reads it
    if "killed" in sys.argv:
        transaction.on_commit(lambda: os.kill(os.getpid(), signal.SIGKILL))
    return order


with transaction.atomic():
    placed = place()
    transaction.on_commit(lambda: charge.delay(placed.pk))
