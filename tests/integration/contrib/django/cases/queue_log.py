"""``self.queue_log`` in Django's test cases: see the folder's ``test_django.py``."""

from __future__ import annotations

import warnings

from celery import Celery
from django.db import connection
from django.test import TestCase, TransactionTestCase
from project.celery import app
from shop.models import Order, Payment
from shop.tasks import charge

from celery_idempotent import IdempotentTask
from celery_idempotent.contrib.django.test import QueueLogMixin
from celery_idempotent.errors import ConfigurationError


class Eager(QueueLogMixin):
    """Run tasks where they are called."""

    def setUp(self) -> None:
        app.conf.task_always_eager = True

    def tearDown(self) -> None:
        app.conf.task_always_eager = False


class RolledBackTest(Eager, TestCase):
    """In a transaction that is rolled back."""

    def test_rows_and_copies(self) -> None:
        for _ in range(2):
            Order.objects.filter(number="o-1").delete()
        Order.objects.create(number="o-1", amount=5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first = charge.delay("o-1")
        row = self.queue_log.message(charge, "o-1")
        self.assertEqual((row.status, row.processed_status), ("done", "success"))
        again = self.queue_log.deliver_again(first)
        self.assertTrue(again.duplicate)
        self.assertEqual(Payment.objects.count(), 1)
        self.assertIn(row.key, [each.key for each in self.queue_log.messages()])

    def test_a_crash_is_refused(self) -> None:
        with self.assertRaisesRegex(ConfigurationError, "use a TransactionTestCase"):
            self.queue_log.each_crash(charge, "o-1", reset=lambda: None)


class ElsewhereTest(QueueLogMixin, TestCase):
    """An app whose queue log is not in Django's database."""

    def call(self) -> None:
        elsewhere = Celery("elsewhere", set_as_current=False)
        elsewhere.conf.update(task_always_eager=True, idempotent_store="redis://nowhere.invalid")

        def one() -> int:
            return 1

        task = elsewhere.task(one, base=IdempotentTask, name="one", message_id=lambda: "one", shared=False)
        self.assertEqual([task.delay().duplicate for _ in range(2)], [False, True])

    def test_its_log_is_fresh(self) -> None:
        self.call()

    def test_its_log_is_fresh_again(self) -> None:
        self.call()


class CrashTest(Eager, TransactionTestCase):
    """Killed at each point."""

    def test_an_atomic_body_survives_each_crash(self) -> None:
        def reset() -> None:
            Payment.objects.all().delete()
            Order.objects.all().delete()
            Order.objects.create(number="o-1", amount=5)

        if connection.vendor == "sqlite" and connection.is_in_memory_db():
            with self.assertRaisesRegex(ConfigurationError, "which is in memory"):
                self.queue_log.each_crash(charge, "o-1", reset=reset)
            return
        points = []
        for crash in self.queue_log.each_crash(charge, "o-1", reset=reset):
            self.assertEqual(Payment.objects.count(), 1, crash)
            points.append(crash.before)
        self.assertIn("commit", points)
        self.assertGreater(len(points), 6)

    def test_a_plain_body_does_not(self) -> None:
        if connection.vendor == "sqlite" and connection.is_in_memory_db():
            return

        def pay() -> None:
            Order.objects.create(number="broken", amount=5)

        task = app.task(pay, base=IdempotentTask, name="pay", shared=False, acks_late=True)
        self.addCleanup(app.tasks.pop, "pay")
        wrong = [
            crash
            for crash in self.queue_log.each_crash(task, reset=Order.objects.all().delete)
            if Order.objects.count() != 1 or crash.result.failed()
        ]
        self.assertTrue(wrong)
