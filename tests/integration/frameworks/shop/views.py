"""How orders are placed over the web."""

from __future__ import annotations

from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.urls import path

from tests.integration.frameworks.shop.models import Order
from tests.integration.frameworks.shop.tasks import charge


def on_commit(request: HttpRequest) -> HttpResponse:
    with transaction.atomic():
        order = Order.objects.create(amount=int(request.GET["amount"]))
        transaction.on_commit(lambda: charge.delay(order.pk), robust=True)
        check(order)
    return HttpResponse(order.pk)


def check(order: Order) -> None:
    if order.amount < 0:
        raise ValueError("no such amount")


urlpatterns = [path("on-commit", on_commit)]
