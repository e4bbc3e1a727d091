"""A queue log in the database of another alias, as Django runs its tests: see the folder's ``test_django.py``."""

from __future__ import annotations

from typing import ClassVar

from django.db import transaction
from django.test import TestCase, TransactionTestCase
from project.celery import app
from shop.models import Order
from shop.tasks import confirm

from celery_idempotent import IdempotentTask
from celery_idempotent.contrib.django.models import Message


class RefusedError(Exception):
    """What a block is left by."""


class AliasesTest(TransactionTestCase):
    """A call belongs to the transactions of the queue log's alias."""

    databases: ClassVar = {"default", "log"}

    def test_a_call_joins_the_block_of_its_alias_only(self) -> None:
        with self.assertRaises(RefusedError), transaction.atomic(using="log"):
            confirm.delay("1")
            raise RefusedError
        with self.assertRaises(RefusedError), transaction.atomic():
            confirm.delay("2")
            raise RefusedError
        self.assertEqual([message.message_id for message in Message.objects.all()], ["confirm:2"])

    def test_blocks_of_both_aliases_are_kept_apart(self) -> None:
        with transaction.atomic(using="log"), self.assertRaises(RefusedError), transaction.atomic():
            Order.objects.create(number="1", amount=1)
            confirm.delay("1")
            raise RefusedError
        self.assertEqual(Order.objects.count(), 0)
        self.assertIsNotNone(Message.objects.get().published_at)

    def test_a_body_is_in_a_block_of_the_queue_logs_alias(self) -> None:
        app.conf.task_always_eager = True
        self.addCleanup(setattr, app.conf, "task_always_eager", False)
        blocks = []

        @app.task(base=IdempotentTask, name="body", atomic=True, shared=False)
        def body() -> None:
            blocks.extend(transaction.get_connection(alias).in_atomic_block for alias in ("default", "log"))

        self.addCleanup(app.tasks.pop, "body")
        body.delay()
        self.assertEqual(blocks, [False, True])


class WithoutTheAliasTest(TestCase):
    """A test that may use the default database only."""

    def test_a_call_is_refused(self) -> None:
        with self.assertRaisesRegex(AssertionError, "log"):
            confirm.delay("1")
