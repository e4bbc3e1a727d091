"""Atomic bodies that write by the ORM, as Django runs its tests: see the folder's ``test_django.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django.db import DatabaseError, IntegrityError, connection, transaction
from django.test import TransactionTestCase
from project.celery import app
from shop.models import Order
from shop.tasks import confirm

from celery_idempotent import IdempotentTask
from celery_idempotent.contrib.django.models import Message
from celery_idempotent.errors import IdempotentError


@contextmanager
def atomic_task(body: Callable[[], Any]) -> Iterator[Any]:
    """Yield an atomic task of this body, which runs where it is called."""
    app.conf.task_always_eager = True
    task = app.task(base=IdempotentTask, name="body", atomic=True, shared=False)(body)
    try:
        yield task
    finally:
        app.conf.task_always_eager = False
        app.tasks.pop("body")


def collide() -> None:
    """Have the database end the transaction in favour of another one."""
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("DO $$ BEGIN RAISE EXCEPTION 'in the way' USING ERRCODE = '40001'; END $$")
        else:
            cursor.execute("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'in the way'")


class BodiesTest(TransactionTestCase):
    """What is kept of a body, and what its message says."""

    def run_(self, body: Callable[[], Any]) -> Message:
        with atomic_task(body) as task:
            result = task.delay()
            self.error = result.result if result.failed() else None
        return Message.objects.get(task_name="body")

    def numbers(self) -> set[str]:
        return set(Order.objects.values_list("number", flat=True))

    def test_it_commits_with_its_message(self) -> None:
        def body() -> None:
            self.assertTrue(connection.in_atomic_block)
            Order.objects.create(number="1", amount=1)

        self.assertEqual(self.run_(body).processed_status, "success")
        self.assertEqual(self.numbers(), {"1"})
        self.assertFalse(connection.in_atomic_block)

    def test_an_error_leaves_nothing_of_it(self) -> None:
        def body() -> None:
            Order.objects.create(number="1", amount=1)
            raise ValueError("no")

        self.assertEqual(self.run_(body).processed_status, "failure")
        self.assertEqual(self.numbers(), set())

    def test_an_error_in_a_savepoint_leaves_the_rest(self) -> None:
        def body() -> None:
            Order.objects.create(number="1", amount=1)
            with self.assertRaises(IntegrityError), transaction.atomic():
                Order.objects.create(number="1", amount=2)
            Order.objects.create(number="2", amount=2)

        self.assertEqual(self.run_(body).processed_status, "success")
        self.assertEqual(self.numbers(), {"1", "2"})

    def test_a_caught_error_that_ended_the_transaction_fails_the_message(self) -> None:
        if connection.vendor != "postgresql":
            self.skipTest("only PostgreSQL ends a transaction for any error")

        def body() -> None:
            Order.objects.create(number="1", amount=1)
            with self.assertRaises(DatabaseError), connection.cursor() as cursor:
                cursor.execute("SELECT 1 / 0")

        self.assertEqual(self.run_(body).processed_status, "failure")
        self.assertIsInstance(self.error, IdempotentError)
        self.assertEqual(self.numbers(), set())

    def test_a_body_that_asks_for_a_rollback_fails(self) -> None:
        def body() -> None:
            Order.objects.create(number="1", amount=1)
            transaction.set_rollback(True)

        self.assertEqual(self.run_(body).processed_status, "failure")
        self.assertEqual(self.numbers(), set())

    def test_a_collision_runs_it_again(self) -> None:
        if connection.vendor == "sqlite":
            self.skipTest("a real one of SQLite is in test_django.py")
        runs: list[int] = []

        def body() -> None:
            runs.append(len(runs))
            Order.objects.create(number=str(len(runs)), amount=1)
            if len(runs) == 1:
                collide()
            if len(runs) == 2:
                with self.assertRaises(DatabaseError), transaction.atomic():
                    collide()  # and the body goes on as if nothing had been lost

        self.assertEqual(self.run_(body).processed_status, "success")
        self.assertEqual((runs, self.numbers()), ([0, 1, 2], {"3"}))

    def test_a_durable_block_is_refused(self) -> None:
        def body() -> None:
            with transaction.atomic(durable=True):
                Order.objects.create(number="1", amount=1)

        self.assertEqual(self.run_(body).processed_status, "failure")
        self.assertRegex(str(self.error), "durable")

    def test_hooks_run_behind_the_commit_and_cannot_undo_it(self) -> None:
        seen: list[Any] = []

        def hook() -> None:
            seen.append((connection.in_atomic_block, Message.objects.get(task_name="body").processed_status))
            raise ValueError("of a hook")

        def body() -> None:
            Order.objects.create(number="1", amount=1)
            transaction.on_commit(hook)

        with self.assertLogs("django.db.backends.base", "ERROR"):
            self.assertEqual(self.run_(body).processed_status, "success")
        self.assertEqual((seen, self.numbers()), ([(False, "success")], {"1"}))

    def test_its_calls_are_sent_when_it_has_committed(self) -> None:
        def body() -> None:
            confirm.delay("1")
            with self.assertRaises(ValueError), transaction.atomic():
                confirm.delay("2")
                raise ValueError
            self.assertEqual(Message.objects.get(message_id="confirm:1").status, "pending")

        self.run_(body)
        done = Message.objects.filter(task_name=confirm.name).values_list("message_id", "processed_status")
        self.assertEqual(list(done), [("confirm:1", "success")])

    def test_an_eager_call_inside_stands_for_itself(self) -> None:
        @app.task(base=IdempotentTask, name="inner", atomic=True, shared=False)
        def inner() -> None:
            Order.objects.create(number="inner", amount=1)
            raise ValueError

        self.addCleanup(app.tasks.pop, "inner")

        def body() -> None:
            Order.objects.create(number="outer", amount=1)
            inner.apply()

        self.assertEqual(self.run_(body).processed_status, "success")
        self.assertEqual(self.numbers(), {"outer"})

    def test_a_plain_body_may_open_a_block_of_its_own(self) -> None:
        app.conf.task_always_eager = True
        self.addCleanup(setattr, app.conf, "task_always_eager", False)

        @app.task(base=IdempotentTask, name="plain", shared=False)
        def plain() -> None:
            with transaction.atomic(durable=True):
                Order.objects.create(number="1", amount=1)
                confirm.delay("1")

        self.addCleanup(app.tasks.pop, "plain")
        plain.delay()
        self.assertEqual(self.numbers(), {"1"})
        self.assertEqual(set(Message.objects.values_list("processed_status", flat=True)), {"success"})
