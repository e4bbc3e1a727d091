"""Calls inside of ``transaction.atomic()``, as Django runs its tests: see the folder's ``test_django.py``."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any
from unittest import mock

from asgiref.sync import async_to_sync, sync_to_async
from celery.signals import before_task_publish
from django.db import DatabaseError, connection, transaction
from django.test import TransactionTestCase
from kombu import Producer
from project.celery import app
from shop.models import Order
from shop.tasks import confirm

from celery_idempotent import outbox
from celery_idempotent.contrib.django.models import Message
from celery_idempotent.producer.relay import relay


class RefusedError(Exception):
    """What a block is left by."""


class TransactionsTest(TransactionTestCase):
    """What is recorded, what is published, and in which order."""

    def setUp(self) -> None:
        self.events: list[str] = []
        before_task_publish.connect(self.note)
        self.addCleanup(before_task_publish.disconnect, self.note)

    def note(self, *, properties: Any, **_: Any) -> None:
        self.events.append(properties["message_id"])

    def ids(self) -> set[str]:
        return {message.message_id for message in Message.objects.all()}

    def test_calls_and_hooks_keep_their_order(self) -> None:
        with transaction.atomic():
            transaction.on_commit(partial(self.events.append, "before"))
            confirm.delay("1")
            confirm.delay("2")
            transaction.on_commit(partial(self.events.append, "between"))
            confirm.delay("3")
            self.assertEqual(self.events, [])
        self.assertEqual(self.events, ["before", "confirm:1", "confirm:2", "between", "confirm:3"])
        self.assertEqual(self.ids(), {"confirm:1", "confirm:2", "confirm:3"})
        self.assertEqual(relay(app.queue_log).published, 0, "all were published, and it was noted")

    def test_a_rolled_back_savepoint_takes_its_calls_along(self) -> None:
        with transaction.atomic():
            confirm.delay("1")
            with self.assertRaises(RefusedError), transaction.atomic():
                confirm.delay("2")
                raise RefusedError
            with transaction.atomic(durable=False):
                confirm.delay("3")
            sid = transaction.savepoint()
            confirm.delay("4")
            transaction.savepoint_rollback(sid)
        self.assertEqual(self.events, ["confirm:1", "confirm:3"])
        self.assertEqual(self.ids(), {"confirm:1", "confirm:3"})

    def test_a_rollback_leaves_nothing(self) -> None:
        with transaction.atomic():
            Order.objects.create(number="1", amount=1)
            confirm.delay("1")
            transaction.set_rollback(True)
        self.assertEqual((self.events, self.ids(), Order.objects.count()), ([], set(), 0))
        confirm.delay("1")
        self.assertEqual(self.events, ["confirm:1"])

    def test_a_commit_that_the_server_answers_by_a_rollback_publishes_nothing(self) -> None:
        if connection.vendor != "postgresql":
            self.skipTest("only PostgreSQL does so")
        with transaction.atomic():
            confirm.delay("1")
            with self.assertRaises(DatabaseError), connection.cursor() as cursor:
                cursor.execute("SELECT 1 / 0")
        self.assertEqual((self.events, self.ids()), ([], set()))

    def test_a_duplicate_in_a_block_is_known_and_counted(self) -> None:
        first = confirm.delay("1")
        with transaction.atomic():
            again = confirm.delay("1")
            self.assertEqual((again.duplicate, again.id), (True, first.id))
        self.assertEqual(Message.objects.get().duplicates, 1)

    def test_a_batch_in_a_block_is_part_of_it(self) -> None:
        with self.assertRaises(RefusedError), transaction.atomic():
            with outbox():
                for number in range(5):
                    confirm.delay(str(number))
            self.assertEqual(len(self.ids()), 5)
            raise RefusedError
        self.assertEqual((self.events, self.ids()), ([], set()))

    def test_what_the_broker_does_not_take_is_relayed(self) -> None:
        broken = mock.patch.object(Producer, "publish", side_effect=ConnectionError("no broker"))
        with broken, self.assertLogs("celery_idempotent", "ERROR"), transaction.atomic():
            confirm.delay("1")
        self.assertEqual(self.ids(), {"confirm:1"})
        self.assertIsNone(Message.objects.get().published_at)
        self.assertEqual(relay(app.queue_log).published, 1)
        self.assertIsNotNone(Message.objects.get().published_at)

    def test_a_hook_that_fails_before_it_leaves_the_message_to_the_relay(self) -> None:
        with self.assertRaises(RefusedError), transaction.atomic():
            transaction.on_commit(refuse)
            confirm.delay("1")
        self.assertEqual((self.events, self.ids()), ([], {"confirm:1"}))
        # Whoever recorded it may publish it for some seconds.
        with connection.cursor() as cursor:
            cursor.execute(
                "UPDATE queue_log SET lease_expires_at = created_timestamp, available_at = created_timestamp"
            )
        self.assertEqual(relay(app.queue_log).published, 1)

    def test_celerys_own_methods_wait_for_the_commit_too(self) -> None:
        with transaction.atomic():
            confirm.delay_on_commit("1")
            confirm.apply_async_on_commit(("1",), countdown=1)
            self.assertEqual(self.ids(), set())
        self.assertEqual((self.events, self.ids()), (["confirm:1"], {"confirm:1"}))

    def test_a_connection_that_breaks_leaves_nothing(self) -> None:
        if connection.vendor != "postgresql":
            self.skipTest("how a server ends a connection differs")
        with self.assertRaises(DatabaseError), transaction.atomic():
            confirm.delay("1")
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        connection.close()
        self.assertEqual((self.events, self.ids()), ([], set()))
        with transaction.atomic():
            confirm.delay("1")
        self.assertEqual(self.events, ["confirm:1"])

    def test_a_coroutine_in_a_block_calls_in_its_transaction(self) -> None:
        async def call(number: str) -> bool:
            return bool((await confirm.adelay(number)).duplicate)

        with self.assertRaises(RefusedError), transaction.atomic():
            self.assertEqual([async_to_sync(call)("1"), async_to_sync(call)("1")], [False, True])
            self.assertEqual((self.events, self.ids()), ([], {"confirm:1"}))
            raise RefusedError
        self.assertEqual((self.events, self.ids()), ([], set()))
        with transaction.atomic():
            async_to_sync(call)("2")
            self.assertEqual(self.events, [])
        self.assertEqual(self.events, ["confirm:2"])

    async def test_an_async_view_calls_by_djangos_thread(self) -> None:
        first = await confirm.adelay("1")
        again, _ = await asyncio.gather(confirm.adelay("1"), confirm.adelay("2"))
        self.assertEqual((again.duplicate, again.id), (True, first.id))
        self.assertEqual(sorted(self.events), ["confirm:1", "confirm:2"])

        @sync_to_async
        def place() -> None:
            with transaction.atomic():
                async_to_sync(confirm.adelay)("3")
                raise RefusedError

        with self.assertRaises(RefusedError):
            await place()
        self.assertEqual(sorted(self.events), ["confirm:1", "confirm:2"])

    def test_without_the_outbox_a_call_is_sent_at_once(self) -> None:
        if connection.vendor == "sqlite":
            self.skipTest("SQLite has one writer at a time, and this one waits for the block")
        without = mock.patch.dict(vars(app.queue_log), settings=replaced(app.queue_log.settings, django_outbox=False))
        with self.assertRaises(RefusedError), without, transaction.atomic():
            confirm.delay("1")
            raise RefusedError
        self.assertEqual((self.events, self.ids()), (["confirm:1"], {"confirm:1"}))

    def test_many_calls_are_read_back_in_one_statement(self) -> None:
        with transaction.atomic():
            for number in range(50):
                confirm.delay(str(number))
        self.assertEqual(len(self.events), 50)
        self.assertEqual(Message.objects.filter(published_at__isnull=False).count(), 50)


def refuse() -> None:
    raise RefusedError


def replaced(settings: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(settings, **changes)
