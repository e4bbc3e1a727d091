"""Django's transactions and the queue log, in one PostgreSQL database."""

from __future__ import annotations

import signal
import unittest
from functools import partial

import pytest
from django.db import DatabaseError, connection, transaction
from django.test import Client, TestCase

from celery_idempotent.maintenance.recovery import Recovery
from tests.integration.frameworks.conftest import Shop
from tests.support.waiting import wait_until
from tests.support.worker import ROOT

WAYS = ("on-commit", "outbox")


@pytest.mark.parametrize("way", WAYS)
def test_a_view_that_commits_publishes(shop: Shop, way: str) -> None:
    for _ in range(2):
        order = int(Client().get(f"/{way}?amount=500").content)
        assert shop.outbox_app.published() == [f"order:{order}"]
        assert shop.message(order) == "pending"
        assert shop.Order.objects.filter(pk=order).exists()
    assert shop.outbox_app.store.unsent(limit=9) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_view_that_fails_leaves_neither_order_nor_message(shop: Shop, way: str) -> None:
    response = Client(raise_request_exception=False).get(f"/{way}?amount=-1")
    assert response.status_code == 500
    assert shop.outbox_app.published() == []
    assert not shop.Order.objects.exists()
    assert shop.outbox_app.store.unsent(limit=9) == []
    Client().get(f"/{way}?amount=500")
    assert len(shop.outbox_app.published()) == 1


def test_celerys_own_words_for_on_commit_are_there_with_its_class_among_the_bases(shop: Shop) -> None:
    task = shop.outbox_app.app.tasks["charge_on_commit"]
    with transaction.atomic():
        order = shop.Order.objects.create(amount=500)
        task.delay_on_commit(order.pk)
        task.delay_on_commit(order.pk)
        assert shop.outbox_app.published() == []
    assert shop.outbox_app.published() == [f"order:{order.pk}"], "the second one was a duplicate"


# -- the window of on_commit, and what closes it ------------------------------------------------------------------------------


def test_a_process_that_dies_between_its_commit_and_on_commit_loses_the_call_until_it_is_swept(shop: Shop) -> None:
    known, ended = shop.process("on-commit", killed=False)
    assert (ended, shop.message(known)) == (0, "pending")
    assert shop.outbox_app.published() == [f"order:{known}"]

    order, ended = shop.process("on-commit", killed=True)
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


# -- an outbox in Django's own transaction ------------------------------------------------------------------------------------


def test_a_process_that_dies_between_its_commit_and_the_publication_leaves_the_message_to_the_relay(shop: Shop) -> None:
    known, ended = shop.process("outbox", killed=False)
    assert (ended, shop.outbox_app.published()) == (0, [f"order:{known}"])

    order, ended = shop.process("outbox", killed=True)
    assert ended == -signal.SIGKILL
    assert shop.Order.objects.filter(pk=order).exists()
    assert shop.message(order) == "pending"
    assert shop.outbox_app.published() == []

    assert sum(step.relayed for step in Recovery(shop.outbox_app.app.queue_log).passes(in_flight=True)) == 1
    assert shop.outbox_app.published() == [f"order:{order}"]


def test_order_and_message_are_in_one_transaction_which_is_djangos(shop: Shop) -> None:
    with shop.django_outbox():
        shop.Order.objects.create(amount=1)
        backend, began = transaction_of()
        order = shop.Order.objects.create(amount=2)
        result = shop.charge.delay(order.pk)
        assert shop.message(order.pk) is None, "others do not see it yet"
        assert seen_inside(order.pk) == "pending"
        again = shop.charge.delay(order.pk)
        assert (result.duplicate, again.duplicate, again.id) == (False, True, result.id)
        assert transaction_of() == (backend, began)
        assert shop.outbox_app.published() == []
    assert shop.outbox_app.published() == [f"order:{order.pk}"]
    assert shop.outbox_app.there("charge", f"order:{order.pk}").duplicates == 1
    assert connection.get_autocommit()
    assert transaction_of()[0] == backend, "the connection is as it was"


def test_what_django_rolls_back_without_an_error_never_was(shop: Shop) -> None:
    with shop.django_outbox():
        order = shop.Order.objects.create(amount=1)
        shop.charge.delay(order.pk)
        transaction.set_rollback(True)
    assert (shop.message(order.pk), shop.outbox_app.published()) == (None, [])


def test_an_error_of_the_database_that_was_caught_keeps_nothing(shop: Shop) -> None:
    """PostgreSQL answers the COMMIT of such a transaction by a ROLLBACK, without an error."""
    with pytest.raises(transaction.TransactionManagementError, match="was caught"), shop.django_outbox():  # noqa: PT012
        order = shop.Order.objects.create(amount=1)
        shop.charge.delay(order.pk)
        with pytest.raises(DatabaseError), connection.cursor() as cursor:
            cursor.execute("SELECT 1 / 0")
    assert (shop.message(order.pk), shop.outbox_app.published()) == (None, [])


def test_after_a_savepoint_that_was_rolled_back_the_relay_publishes_what_is_left(shop: Shop) -> None:
    with shop.django_outbox():
        kept = shop.Order.objects.create(amount=1)
        shop.charge.delay(kept.pk)
        with transaction.atomic():
            released = shop.Order.objects.create(amount=2)
            shop.charge.delay(released.pk)
        with pytest.raises(ZeroDivisionError), transaction.atomic():  # noqa: PT012
            undone = shop.Order.objects.create(amount=3)
            shop.charge.delay(undone.pk)
            raise ZeroDivisionError
    assert shop.outbox_app.published() == []
    assert shop.message(undone.pk) is None
    list(Recovery(shop.outbox_app.app.queue_log).passes(in_flight=True))
    # In no order that this broker keeps: its files are named by the millisecond.
    assert set(shop.outbox_app.published()) == {f"order:{kept.pk}", f"order:{released.pk}"}


def test_a_broker_that_takes_nothing_fails_no_view(shop: Shop) -> None:
    with shop.outbox_app.broken_broker():
        order = int(Client().get("/outbox?amount=500").content)
    assert shop.message(order) == "pending"
    # The pause after a failure is the publisher's; the relay has none.
    assert Recovery(shop.outbox_app.app.queue_log).run_pass().relayed == 1
    assert shop.outbox_app.published() == [f"order:{order}"]
    wait_until(partial(next_is_published, shop), describe="the end of the pause")


def test_a_callback_that_fails_behind_the_commit_leaves_the_message_to_the_relay(shop: Shop) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), shop.django_outbox():  # noqa: PT012
        order = shop.Order.objects.create(amount=1)
        shop.charge.delay(order.pk)
        transaction.on_commit(fail)
    assert shop.message(order.pk) == "pending"
    shop.outbox_app.published()


def test_the_outbox_is_around_the_whole_transaction_or_refuses(shop: Shop) -> None:
    with pytest.raises(RuntimeError, match="durable"), transaction.atomic(), shop.django_outbox():
        pass
    assert connection.get_autocommit()


def test_in_a_testcase_of_djangos_it_is_recorded_and_never_published(shop: Shop) -> None:
    """Its transaction is rolled back, whatever is said of commits inside."""

    class InATransaction(TestCase):  # type: ignore[misc] # Django has no types
        def runTest(self) -> None:  # noqa: N802 - unittest's word
            with self.captureOnCommitCallbacks(execute=True), shop.django_outbox():
                assert not shop.charge.delay(-1).duplicate
            assert seen_inside(-1) == "pending"
            assert shop.outbox_app.published() == []

    result = unittest.TestResult()
    unittest.TestSuite([InATransaction()]).run(result)
    assert (result.testsRun, result.errors, result.failures) == (1, [], [])
    assert (shop.message(-1), shop.outbox_app.published()) == (None, [])


def test_a_connection_that_broke_is_replaced_by_django(shop: Shop) -> None:
    with shop.outbox_app.effects.engine.connect() as other, pytest.raises(DatabaseError), shop.django_outbox():  # noqa: PT012
        shop.charge.delay(0)
        other.exec_driver_sql(f"SELECT pg_terminate_backend({transaction_of()[0]})")
        shop.Order.objects.create(amount=1)
    connection.close_if_unusable_or_obsolete()
    assert shop.message(0) is None
    order = int(Client().get("/outbox?amount=500").content)
    assert shop.outbox_app.published() == [f"order:{order}"]


def test_the_page_shows_this_outbox() -> None:
    page = (ROOT / "docs" / "how-to" / "django.md").read_text()
    source = (ROOT / "tests" / "integration" / "frameworks" / "shop" / "outbox.py").read_text()
    assert source.partition("\n\n")[2].strip() in page


def transaction_of() -> tuple[int, object]:
    """Return the server's process and the transaction that Django is in."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid(), xact_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")
        backend, began = cursor.fetchone()
    return backend, began


def seen_inside(order: int) -> object:
    with connection.cursor() as cursor:
        cursor.execute("SELECT status FROM queue_log WHERE message_id = %s", [f"order:{order}"])
        (status,) = cursor.fetchone()
    return status


def next_is_published(shop: Shop) -> bool:
    order = int(Client().get("/outbox?amount=500").content)
    return f"order:{order}" in shop.outbox_app.published()
