"""Django's ``on_commit``, with a queue log that is in no transaction of Django's, and the sweep behind it."""

from __future__ import annotations

import signal

from django.db import transaction
from django.test import Client

from celery_idempotent.maintenance.recovery import Recovery
from tests.integration.frameworks.conftest import Shop


def test_a_view_that_commits_publishes(shop: Shop) -> None:
    for _ in range(2):
        order = int(Client().get("/on-commit?amount=500").content)
        assert shop.outbox_app.published() == [f"order:{order}"]
        assert shop.message(order) == "pending"
        assert shop.Order.objects.filter(pk=order).exists()
    assert shop.outbox_app.store.unsent(limit=9) == []


def test_a_view_that_fails_leaves_neither_order_nor_message(shop: Shop) -> None:
    response = Client(raise_request_exception=False).get("/on-commit?amount=-1")
    assert response.status_code == 500
    assert shop.outbox_app.published() == []
    assert not shop.Order.objects.exists()
    assert shop.outbox_app.store.unsent(limit=9) == []
    Client().get("/on-commit?amount=500")
    assert len(shop.outbox_app.published()) == 1


def test_celerys_django_methods_work_with_its_class_as_a_base(shop: Shop) -> None:
    task = shop.outbox_app.app.tasks["charge_on_commit"]
    with transaction.atomic():
        order = shop.Order.objects.create(amount=500)
        task.delay_on_commit(order.pk)
        task.delay_on_commit(order.pk)
        assert shop.outbox_app.published() == []
    assert shop.outbox_app.published() == [f"order:{order.pk}"], "the second one was a duplicate"


# -- the window of on_commit, and what closes it ------------------------------------------------------------------------------


def test_on_commit_loses_the_call_of_a_dying_process_until_it_is_swept(shop: Shop) -> None:
    known, ended = shop.process(killed=False)
    assert (ended, shop.message(known)) == (0, "pending")
    assert shop.outbox_app.published() == [f"order:{known}"]

    order, ended = shop.process(killed=True)
    assert ended == -signal.SIGKILL
    assert shop.Order.objects.filter(pk=order, charged=False).exists(), "it was committed"
    assert shop.message(order) is None
    assert sum(step.relayed for step in Recovery(shop.outbox_app.app.queue_log).passes(in_flight=True)) == 0
    assert shop.outbox_app.published() == []

    assert shop.sweep(60.0) == 0, "orders that have just been placed are left alone"
    assert shop.sweep(0.0) == 1
    assert shop.outbox_app.published() == [f"order:{order}"], "the other one is a duplicate"
    assert shop.sweep(0.0) == 0
    assert shop.outbox_app.published() == []
    shop.charge.run(order)
    assert shop.Order.objects.filter(charged=False).values_list("pk", flat=True).get() == known


def test_a_call_that_the_broker_did_not_take_is_swept_too(shop: Shop) -> None:
    with shop.outbox_app.broken_broker() as offered:
        response = Client().get("/on-commit?amount=500")
    order = int(response.content)
    assert offered == [f"order:{order}"]
    assert shop.message(order) is None, "its row was withdrawn, and the error logged by Django (robust=True)"
    assert shop.sweep(0.0) == 1
    assert shop.outbox_app.published() == [f"order:{order}"]
