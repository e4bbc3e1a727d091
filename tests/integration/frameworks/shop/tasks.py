"""The project's Celery app and its tasks."""

from __future__ import annotations

from datetime import timedelta

from celery import Celery
from celery.contrib.django.task import DjangoTask
from django.conf import settings
from django.utils import timezone

from celery_idempotent import IdempotentTask, outbox
from tests.integration.frameworks.shop.models import Order

__all__ = ["app", "charge", "charge_on_commit", "sweep"]

app = Celery("shop", broker="filesystem://", backend="cache+memory://", set_as_current=False)
app.conf.update(
    broker_transport_options={
        "data_folder_in": f"{settings.BROKER}/queue",
        "data_folder_out": f"{settings.BROKER}/queue",
        "control_folder": f"{settings.BROKER}/control",
    },
    task_default_queue="shop",
    idempotent_store=settings.STORE,
)


@app.task(base=IdempotentTask, name="charge", message_id="order:{order_id}", shared=False)
def charge(order_id: int) -> None:
    Order.objects.filter(pk=order_id).update(charged=True)


class ShopTask(IdempotentTask, DjangoTask):  # type: ignore[misc] # Celery has no types
    """With ``delay_on_commit``."""


@app.task(base=ShopTask, name="charge_on_commit", message_id="order:{order_id}", shared=False)
def charge_on_commit(order_id: int) -> None:
    charge(order_id)


@app.task(name="sweep", shared=False)
def sweep(older_than: float = 60.0) -> int:
    """Call again for each order that has not been charged; how many of the calls were not known."""
    waiting = Order.objects.filter(charged=False, placed__lt=timezone.now() - timedelta(seconds=older_than))
    with outbox():
        results = [charge.delay(pk) for pk in waiting.values_list("pk", flat=True)]
    return sum(not result.duplicate for result in results)
