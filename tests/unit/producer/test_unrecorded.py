"""Calls while the guard is off: plain Celery's, which ask no store; in an outbox, sent after the commit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, group
from kombu import Message
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from celery_idempotent import ConfigurationError, IdempotentTask, outbox
from celery_idempotent.core.records import RowFilter
from celery_idempotent.message.header import Header, is_marked_unrecorded


def sent_messages(app: Celery) -> list[Message]:
    """Return what was sent since the last look."""
    taken: list[Message] = []
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue](connection.default_channel)
        queue.declare()
        while (message := queue.get(no_ack=True)) is not None:
            taken.append(message)
    return taken


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    app = Celery("off", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(
        idempotent_enabled=False, idempotent_store=f"sqlite:///{tmp_path}/none/log.db", task_default_queue=str(tmp_path)
    )

    @app.task(name="charge", base=IdempotentTask, message_id="order:{order}", on_duplicate="raise", shared=False)
    def charge(order: str, amount: int = 1) -> None: ...

    yield app
    app.close()


def test_the_store_is_not_asked_and_nothing_is_refused(app: Celery, tmp_path: Path) -> None:
    charge = app.tasks["charge"]
    results = [
        charge.delay("o-1"),
        charge.delay("o-1", 2),
        charge.apply_async(("o-1",), message_id="m"),
        *group(charge.s("o-1"), charge.s("o-1")).apply_async().results,
        app.send_task("charge", ("o-1",)),
    ]
    sent = sent_messages(app)
    assert len({result.id for result in results}) == len(sent) == 6
    assert not any(getattr(result, "duplicate", False) for result in results)
    assert all(is_marked_unrecorded(message.headers) for message in sent)
    assert all(Header.read(message.headers) is None for message in sent)
    assert [message.properties.get("message_id") for message in sent].count("m") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_opened_keeps_no_call_back(app: Celery) -> None:
    app.conf.idempotent_store = "nonsense://nowhere"
    app.tasks["charge"].delay("o-1")
    assert len(sent_messages(app)) == 1


def test_an_option_does_not_turn_a_task_on(app: Celery) -> None:
    @app.task(name="on", base=IdempotentTask, idempotent=True, shared=False)
    def on() -> None: ...

    on.delay()
    (message,) = sent_messages(app)
    assert is_marked_unrecorded(message.headers)


def test_the_first_call_warns(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "celery_idempotent"):
        for _ in range(2):
            app.tasks["charge"].delay("o-1")
    (warning,) = caplog.messages
    assert warning.startswith("idempotent_enabled is False: calls are sent as plain Celery calls")


def test_a_task_turned_off_for_good_does_not_warn(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    app.conf.idempotent_enabled = True

    @app.task(name="off", base=IdempotentTask, idempotent=False, shared=False)
    def off() -> None: ...

    with caplog.at_level(logging.WARNING, "celery_idempotent"):
        off.delay()
    assert caplog.messages == []


def test_a_wrong_message_id_is_refused_all_the_same(app: Celery) -> None:
    with pytest.raises(ConfigurationError, match="message_id"):
        app.tasks["charge"].apply_async(("o-1",), message_id="")


def test_an_eager_call_runs_each_time(app: Celery, tmp_path: Path) -> None:
    app.conf.task_always_eager = True
    ran: list[Any] = []

    @app.task(name="note", base=IdempotentTask, message_id="n:{number}", bind=True, shared=False)
    def note(self: IdempotentTask, number: int) -> int:
        ran.append((number, self.request.retries))
        if number == 2 and not self.request.retries:
            raise self.retry(countdown=0)
        return number

    assert [note.delay(number).get() for number in (1, 1, 2)] == [1, 1, 2]
    assert ran == [(1, 0), (1, 0), (2, 0), (2, 1)]
    assert list(tmp_path.iterdir()) == []


class TestInAnOutbox:
    def test_a_session_sends_after_its_commit(self, app: Celery) -> None:
        engine = create_engine("sqlite://")
        with Session(engine) as session, outbox(session):
            result = app.tasks["charge"].delay("o-1")
            app.tasks["charge"].delay("o-1")
            assert sent_messages(app) == []
            session.commit()
            sent = sent_messages(app)
            assert len(sent) == 2
            assert result.id in [message.headers["id"] for message in sent]
            app.tasks["charge"].delay("o-2")
            session.rollback()
        assert sent_messages(app) == []
        engine.dispose()

    def test_a_savepoint_that_is_rolled_back_drops_its_calls(self, app: Celery) -> None:
        engine = create_engine("sqlite://")
        with Session(engine) as session, outbox(session):
            app.tasks["charge"].delay("kept")
            for order, keep in (("dropped", False), ("kept too", True)):
                with session.begin_nested() as savepoint:
                    app.tasks["charge"].delay(order)
                    if not keep:
                        savepoint.rollback()
            session.commit()
        assert [message.decode()[0] for message in sent_messages(app)] == [["kept"], ["kept too"]]
        engine.dispose()

    def test_an_asynchronous_session_sends_after_its_commit(self, app: Celery) -> None:
        async def calls() -> None:
            engine = create_async_engine("sqlite+aiosqlite://")
            async with AsyncSession(engine) as session, outbox(session):
                await app.tasks["charge"].adelay("awaited")
                app.tasks["charge"].delay("plain")
                assert sent_messages(app) == []
                await session.commit()
                await app.tasks["charge"].adelay("dropped")
                app.tasks["charge"].delay("dropped")
                await session.rollback()
            async with outbox():
                await app.tasks["charge"].adelay("batch")
            await app.tasks["charge"].adelay("alone")
            await engine.dispose()

        asyncio.run(calls())
        sent = [message.decode()[0] for message in sent_messages(app)]
        assert sent == [["awaited"], ["plain"], ["batch"], ["alone"]]

    def test_a_connection_sends_after_its_commit(self, app: Celery) -> None:
        engine = create_engine("sqlite://")
        with engine.connect() as connection, outbox(connection):
            app.tasks["charge"].delay("o-1")
            connection.rollback()
            app.tasks["charge"].delay("o-2")
            connection.commit()
        (message,) = sent_messages(app)
        assert message.decode()[0] == ["o-2"]
        engine.dispose()

    def test_a_batch_sends_at_its_end(self, app: Celery) -> None:
        with outbox():
            app.tasks["charge"].delay("o-1")
            assert sent_messages(app) == []
        assert len(sent_messages(app)) == 1
        with suppress(ValueError), outbox():
            app.tasks["charge"].delay("o-1")
            raise ValueError("no")
        assert sent_messages(app) == []

    def test_a_batch_in_a_session_sends_after_the_commit(self, app: Celery) -> None:
        engine = create_engine("sqlite://")
        with Session(engine) as session, outbox(session):
            with outbox():
                app.tasks["charge"].delay("o-1")
            assert sent_messages(app) == []
            session.commit()
        assert len(sent_messages(app)) == 1
        engine.dispose()

    def test_a_call_that_cannot_be_sent_after_the_commit_is_logged(
        self, app: Celery, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise ConnectionError("the broker is down")

        engine = create_engine("sqlite://")
        with Session(engine) as session, outbox(session):
            result = app.tasks["charge"].delay("o-1")
            monkeypatch.setattr(IdempotentTask, "publish", refuse)
            session.commit()
        assert (
            f"charge[{result.id}] was not sent after its commit; it has no row, so nothing will send it" in caplog.text
        )
        engine.dispose()

    def test_the_caller_hears_of_wrong_arguments(self, app: Celery) -> None:
        engine = create_engine("sqlite://")
        with Session(engine) as session, outbox(session), pytest.raises(TypeError, match="amounts"):
            app.tasks["charge"].delay("o-1", amounts=2)
        engine.dispose()


def test_on_again_each_call_is_recorded(app: Celery, tmp_path: Path) -> None:
    app.conf.update(idempotent_enabled=True, idempotent_store=f"sqlite:///{tmp_path}/log.db")
    app.tasks["charge"].delay("o-1")
    assert [row.key.message_id for row in app.queue_log.store.rows(RowFilter())] == ["order:o-1"]
