"""Workers, threads and forbidden databases, as Django runs its tests: see the folder's ``test_django.py``."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery.contrib.testing.worker import start_worker
from django.db import connections
from django.test import SimpleTestCase, TestCase, TransactionTestCase
from project.celery import app
from shop.models import Order, Payment
from shop.tasks import charge

from celery_idempotent import ConfigurationError, IdempotentTask
from celery_idempotent.contrib.django.models import Message


class WorkerInTestCase(TestCase):
    """Of its own, since Celery closes Django's connections when it starts a worker."""

    def test_a_worker_does_not_start(self) -> None:
        with (
            self.assertRaisesRegex(ConfigurationError, "TransactionTestCase"),
            start_worker(app, perform_ping_check=False),
        ):
            self.fail("it started")


class ThreadsInTestCase(TestCase):
    """A ``TestCase`` keeps what it writes to its own thread."""

    def test_another_thread_does_not_record(self) -> None:
        Message.objects.count()
        with ThreadPoolExecutor(1) as pool:
            raised = pool.submit(charge.delay, "o-1").exception()
        self.assertIsInstance(raised, ConfigurationError)
        self.assertRegex(str(raised), "TransactionTestCase")
        self.assertEqual(Message.objects.count(), 0)

    def test_a_body_outlives_its_lease_without_renewals(self) -> None:
        app.conf.task_always_eager = True
        self.addCleanup(setattr, app.conf, "task_always_eager", False)

        @app.task(base=IdempotentTask, name="slow", lease=1, shared=False)
        def slow() -> None:
            time.sleep(2.5)  # two looks for its claim

        self.addCleanup(app.tasks.pop, "slow")
        with self.assertNoLogs("celery_idempotent"):
            slow.delay()
        self.assertEqual(Message.objects.get().processed_status, "success")


class WorkerInTransactionTestCase(TransactionTestCase):
    """A ``TransactionTestCase`` commits."""

    def test_a_worker_runs_what_is_called(self) -> None:
        Order.objects.create(number="o-1", amount=5)
        with start_worker(app, perform_ping_check=False):
            self.client.post("/orders/", {"number": "o-1", "amount": 5})
            self.assertEqual(charge.delay("o-1").get(timeout=60), 5)
        self.assertEqual(Payment.objects.count(), 1)
        self.assertEqual(Message.objects.filter(message_id="charge:o-1").get().processed_status, "success")


class ForbiddenTest(SimpleTestCase):
    """A test that may not use a database does not record in it either."""

    def test_a_call_is_refused(self) -> None:
        with self.assertRaises(AssertionError):
            charge.delay("o-1")

    def test_the_real_database_is_not_reached(self) -> None:
        name: Any = connections["default"].settings_dict["NAME"]
        self.assertIn("test", str(name).replace("memorydb", "test"))
