"""Calls that coroutines await: they are what plain calls are, and the event loop goes on."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
import sqlalchemy as sa
from celery.signals import before_task_publish
from kombu.exceptions import OperationalError
from sqlalchemy.orm import Session

from celery_idempotent import (
    ConfigurationError,
    DuplicateMessageError,
    MessageMismatchError,
    StoreUnavailableError,
    current_message,
    outbox,
)
from celery_idempotent.core.records import ProcessedStatus, Status
from celery_idempotent.producer.off_loop import AT_ONCE
from tests.integration.producer.outbox.conftest import OutboxApp, effects, outbox_app
from tests.support.effects import Effect
from tests.support.ticking import STILL, ticking

__all__ = ["effects", "outbox_app"]

postgresql = pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - it may depend on anything
            await asyncio.sleep(0.01)


@contextmanager
def locked(app: OutboxApp, message_id: str) -> Iterator[sa.Connection]:
    """Hold the id in a transaction, for which each call of it waits."""
    with app.store.engine.connect() as connection:
        app.app.tasks["charge"].delay(message_id)
        connection.exec_driver_sql(f"DELETE FROM queue_log WHERE message_id = '{message_id}'")
        yield connection
        connection.rollback()
    app.messages()


def test_an_awaited_call_is_what_a_plain_one_is(outbox_app: OutboxApp) -> None:
    charge, strict = (outbox_app.app.tasks[name] for name in ("charge", "strict"))

    async def work() -> None:
        first = await charge.adelay("o-1", 5)
        again = await charge.aapply_async(("o-1",), {"amount": 5}, countdown=3)
        assert (first.duplicate, again.duplicate, again.id) == (False, True, first.id)
        named = await charge.aapply_async(("o-1", 7), message_id="m", task_id="t")
        assert (named.id, outbox_app.there("charge", "m").task_id) == ("t", "t")
        with pytest.raises(MessageMismatchError):
            await charge.adelay("o-1", 9)
        await strict.adelay("o-1")
        with pytest.raises(DuplicateMessageError):
            await strict.adelay("o-1")
        with pytest.raises(ConfigurationError, match="message_id"):
            await charge.aapply_async(("o-2",), mesage_id="m")
        with pytest.raises(TypeError):
            await charge.adelay()

    asyncio.run(work())
    assert outbox_app.published() == ["o-1", "m", "o-1"]


def test_hundreds_at_once_are_each_sent_once(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work() -> list[Any]:
        return await asyncio.gather(*(charge.adelay(f"o-{number % 100}") for number in range(200)))

    for _ in range(2):  # each event loop has turns of its own
        results = asyncio.run(work())
    assert all(result.duplicate for result in results)
    assert sorted(outbox_app.published()) == sorted(f"o-{number}" for number in range(100))
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("idempotent-call")]
    assert 0 < len(names) <= AT_ONCE


def test_a_call_has_the_context_of_its_caller(outbox_app: OutboxApp) -> None:
    tenant: ContextVar[str] = ContextVar("tenant")
    seen: list[tuple[str, bool]] = []

    def look(**_: Any) -> None:
        seen.append((tenant.get(), threading.current_thread() is threading.main_thread()))

    async def call(name: str) -> None:
        tenant.set(name)
        await outbox_app.app.tasks["charge"].adelay(name)

    async def work() -> None:
        await asyncio.gather(call("a"), call("b"))

    before_task_publish.connect(look)
    try:
        asyncio.run(work())
    finally:
        before_task_publish.disconnect(look)
    assert sorted(seen) == [("a", False), ("b", False)]


def test_a_call_of_a_guarded_body_is_known_when_the_body_runs_again(outbox_app: OutboxApp) -> None:
    plain = outbox_app.app.tasks["plain"]
    seen: list[Any] = []

    def look(headers: Any, **_: Any) -> None:
        message = current_message()
        seen.append((None if message is None else message.message_id, headers["parent_id"]))

    def body(name: str) -> str:
        return str(asyncio.run(plain.adelay("child")).id)

    parent = outbox_app.task(body, message_id="{name}")
    before_task_publish.connect(look)
    try:
        first = parent.apply(("parent",), task_id="t").get()
        with outbox_app.store.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM queue_log WHERE task_name = 'body'")
        again = parent.apply(("parent",), task_id="t").get()
    finally:
        before_task_publish.disconnect(look)
    assert set(seen) == {("parent", "t")}
    assert {message.properties["message_id"] for message in outbox_app.messages()} == {first}
    assert again == first


@pytest.mark.parametrize("atomic", [False, True])
def test_eager_bodies_that_call_each_other_do_not_wait_for_turns(outbox_app: OutboxApp, atomic: bool) -> None:
    outbox_app.app.conf.task_always_eager = True
    charge = outbox_app.app.tasks["charge"]

    def parent(number: int) -> int:
        asyncio.run(charge.adelay(f"child-{number}"))
        return number

    task = outbox_app.task(parent, message_id="{number}", atomic=atomic)

    async def work() -> list[Any]:
        return await asyncio.gather(*(task.adelay(number) for number in range(2 * AT_ONCE)))

    assert [result.get() for result in asyncio.run(work())] == list(range(2 * AT_ONCE))
    for number in range(2 * AT_ONCE):
        assert outbox_app.there("charge", f"child-{number}").processed_status is ProcessedStatus.SUCCESS


def test_a_call_in_the_block_of_a_plain_session_is_in_its_transaction(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work(session: Session) -> None:
        with outbox(session):
            session.add(Effect(name="o-1"))
            results = await asyncio.gather(charge.adelay("o-1"), charge.adelay("o-1"))
            assert [result.duplicate for result in results] == [False, True]
            assert outbox_app.published() == []
            session.rollback()
            await charge.adelay("o-2")
            session.commit()

    with outbox_app.session() as session:
        asyncio.run(work(session))
    assert outbox_app.published() == ["o-2"]
    assert outbox_app.row("charge", "o-1") is None


def test_a_call_in_an_asynchronous_batch_is_sent_by_its_end(outbox_app: OutboxApp) -> None:
    charge, strict = (outbox_app.app.tasks[name] for name in ("charge", "strict"))

    async def work() -> None:
        async with ticking():
            async with outbox():
                results = [await charge.adelay("o-1"), charge.delay("o-1")]
                assert [result.duplicate for result in results] == [None, None]
            assert [result.duplicate for result in results] == [False, True]
            with pytest.raises(ExceptionGroup, match="1 of 2"):  # noqa: PT012
                async with outbox():
                    strict.delay("o-1")
                    strict.delay("o-1")
            with pytest.raises(ZeroDivisionError):  # noqa: PT012
                async with outbox():
                    charge.delay("o-2")
                    raise ZeroDivisionError

    asyncio.run(work())
    assert outbox_app.published() == ["o-1", "o-1"]


# -- the event loop goes on --------------------------------------------------------------------------------------------


@postgresql
def test_the_loop_goes_on_while_calls_wait_for_the_store(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work(connection: sa.Connection) -> None:
        await charge.adelay("warm")
        async with ticking() as pauses:
            calls = [asyncio.create_task(charge.adelay("o-1")) for _ in range(2 * AT_ONCE)]
            await asyncio.sleep(2)
            assert not any(call.done() for call in calls)
            assert await asyncio.to_thread(lambda: 1) == 1, "and others may use the loop's own threads"
            connection.rollback()
            results = await asyncio.gather(*calls)
        assert all(result.duplicate for result in results)
        assert max(pauses) < STILL

    with locked(outbox_app, "o-1") as connection:
        asyncio.run(work(connection))


@postgresql
def test_the_loop_goes_on_while_the_broker_is_away(outbox_app: OutboxApp) -> None:
    app = outbox_app.app
    app.conf.update(broker_url="amqp://guest@127.0.0.1:1//", broker_write_url="amqp://guest@127.0.0.1:1//")
    app.conf.task_publish_retry_policy = {"max_retries": 4, "interval_start": 0.2, "interval_step": 0.2}

    async def work() -> None:
        async with ticking() as pauses:
            began = time.monotonic()
            with pytest.raises(OperationalError):
                await app.tasks["charge"].adelay("o-1")
            assert time.monotonic() - began > STILL, "a plain call would have kept the loop for as long"
        assert max(pauses) < STILL

    asyncio.run(work())
    assert outbox_app.row("charge", "o-1") is None, "its id is free again"


# -- cancelled awaits --------------------------------------------------------------------------------------------------


async def cancelled(call: asyncio.Task[Any]) -> None:
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


@postgresql
def test_a_call_that_is_cancelled_while_it_waits_for_its_turn_is_not_sent(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work(connection: sa.Connection) -> None:
        before = [asyncio.create_task(charge.adelay("o-1")) for _ in range(AT_ONCE)]
        await asyncio.sleep(0.1)
        waiting = asyncio.create_task(charge.adelay("o-2"))
        await asyncio.sleep(0.1)
        await cancelled(waiting)
        connection.rollback()
        await asyncio.gather(*before)
        assert (await charge.adelay("o-3")).duplicate is False

    with locked(outbox_app, "o-1") as connection:
        asyncio.run(work(connection))
    assert outbox_app.row("charge", "o-2") is None


@postgresql
def test_a_call_that_is_cancelled_while_it_is_recorded_is_sent(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work(connection: sa.Connection) -> None:
        call = asyncio.create_task(charge.adelay("o-1"))
        await asyncio.sleep(0.5)
        await cancelled(call)
        connection.commit()  # the id is free
        await until(lambda: outbox_app.row("charge", "o-1"))
        assert (await charge.adelay("o-1")).duplicate is True
        await until(publications)

    published: list[str] = []

    def publications() -> list[str]:
        published.extend(outbox_app.published())
        return published

    with outbox_app.store.engine.connect() as connection:
        charge.delay("o-1")
        outbox_app.messages()
        connection.exec_driver_sql("DELETE FROM queue_log")
        asyncio.run(work(connection))
    assert published == ["o-1"]


@pytest.mark.parametrize("ends", ["sent", "refused"])
def test_a_call_that_is_cancelled_while_it_is_published_is_whole(
    outbox_app: OutboxApp, ends: str, caplog: pytest.LogCaptureFixture
) -> None:
    charge = outbox_app.app.tasks["charge"]
    reached, go_on = threading.Event(), threading.Event()

    def slowly(*args: Any, **options: Any) -> Any:
        reached.set()
        assert go_on.wait(30)
        if ends == "refused":
            raise OperationalError("it takes nothing")
        return publish(*args, **options)

    async def work() -> None:
        call = asyncio.create_task(charge.adelay("o-1"))
        await until(reached.is_set)
        assert outbox_app.row("charge", "o-1") is not None
        await cancelled(call)

    with caplog.at_level(logging.WARNING, "celery_idempotent"), pytest.MonkeyPatch.context() as patch:
        publish = type(charge).publish
        patch.setattr(type(charge), "publish", slowly)
        asyncio.run(work())
        go_on.set()
        outbox_app.app.queue_log.end()  # waits for nothing
        if ends == "sent":
            wait_for(lambda: outbox_app.published() == ["o-1"])
            assert outbox_app.there("charge", "o-1").status is Status.PENDING
        else:
            wait_for(lambda: outbox_app.row("charge", "o-1") is None)
            wait_for(lambda: "after its await was cancelled" in caplog.text)


def wait_for(condition: Callable[[], object]) -> None:
    asyncio.run(until(condition))


def test_a_store_that_is_away_is_an_error_of_the_await(outbox_app: OutboxApp) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailableError("away")

    outbox_app.app.conf.task_publish_retry_policy = {"max_retries": 0}

    async def work() -> None:
        with pytest.raises(StoreUnavailableError):
            await outbox_app.app.tasks["charge"].adelay("o-1")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbox_app.store, "record", away)
        asyncio.run(work())
    assert outbox_app.messages() == []
