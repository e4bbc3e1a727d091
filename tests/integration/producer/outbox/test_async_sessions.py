"""``async with outbox(session)``: an ``AsyncSession`` as it is, on each asynchronous driver."""

from __future__ import annotations

import asyncio
import contextvars
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import group
from celery.signals import before_task_publish
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from celery_idempotent import ConfigurationError, DuplicateMessageError, MessageMismatchError, outbox
from celery_idempotent.core.records import ProcessedStatus
from celery_idempotent.producer.off_loop import AT_ONCE
from celery_idempotent.producer.relay import relay
from tests.integration.producer.outbox.conftest import OutboxApp
from tests.support.effects import Effect
from tests.support.worker import ROOT

DRIVERS = [
    ("sqlite", "sqlite+aiosqlite"),
    ("postgresql", "postgresql+asyncpg"),
    ("postgresql", "postgresql+psycopg"),
    ("mariadb", "mysql+asyncmy"),
]

every_driver = pytest.mark.parametrize(("store_url", "driver"), DRIVERS, indirect=["store_url"])
some_drivers = pytest.mark.parametrize(("store_url", "driver"), DRIVERS[:2], indirect=["store_url"])

Work = Callable[[AsyncSession], Coroutine[Any, Any, None]]


class RefusedError(Exception):
    """What a block is left by."""


@pytest.fixture
def engine(store_url: str, driver: str) -> AsyncEngine:
    url = sa.make_url(store_url).set(drivername=driver)
    arguments: dict[str, Any] = {}
    if driver.endswith("asyncpg"):
        path = str(url.query["options"]).partition("=")[2]
        url, arguments = url.set(query={}), {"server_settings": {"search_path": path}}
    # A pool would be bound to one event loop.
    return create_async_engine(url, poolclass=sa.NullPool, connect_args=arguments)


@pytest.fixture
def run(engine: AsyncEngine) -> Callable[[Work], None]:
    """Return what runs a coroutine with a session."""

    def run(work: Work) -> None:
        async def with_session() -> None:
            async with AsyncSession(engine) as session:
                await work(session)

        asyncio.run(with_session())

    return run


@pytest.fixture
def publications(outbox_app: OutboxApp) -> Iterator[list[tuple[bool, bool]]]:
    """Each publication: whether others saw its row then, and whether the event loop's thread made it."""
    seen: list[tuple[bool, bool]] = []

    def look(*, properties: Any, headers: Any, **_: Any) -> None:
        row = outbox_app.row(headers["task"], properties["message_id"])
        seen.append((row is not None, threading.current_thread() is threading.main_thread()))

    before_task_publish.connect(look)
    yield seen
    before_task_publish.disconnect(look)


@every_driver
def test_an_order_and_its_calls_are_in_one_commit(
    run: Callable[[Work], None], outbox_app: OutboxApp, publications: list[tuple[bool, bool]]
) -> None:
    charge, strict = (outbox_app.app.tasks[name] for name in ("charge", "strict"))

    async def work(session: AsyncSession) -> None:
        async with outbox(session):
            session.add(Effect(name="o-1"))
            await session.flush()
            results = [await charge.adelay("o-1"), await charge.adelay("o-1")]
            assert [result.duplicate for result in results] == [False, True]
            assert results[0].id == results[1].id
            with pytest.raises(MessageMismatchError):
                await charge.adelay("o-1", 9)
            await strict.adelay("o-1")
            with pytest.raises(DuplicateMessageError):
                await strict.adelay("o-1")
            await asyncio.gather(*(charge.adelay(f"o-{number}") for number in (2, 3, 4)))
            assert outbox_app.published() == []
            assert outbox_app.row("charge", "o-1") is None
            await session.commit()
        assert outbox_app.there("charge", "o-1").duplicates == 1

    run(work)
    assert outbox_app.published() == ["o-1", "o-1", "o-2", "o-3", "o-4"]
    assert outbox_app.effects.names() == ["o-1"]
    assert publications == [(True, False)] * 5
    assert outbox_app.store.unsent(limit=9) == []


@every_driver
def test_a_rollback_leaves_nothing(run: Callable[[Work], None], outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work(session: AsyncSession) -> None:
        with pytest.raises(RefusedError):  # noqa: PT012
            async with session.begin(), outbox(session):
                session.add(Effect(name="o-1"))
                await charge.adelay("o-1")
                charge.delay("o-2")
                raise RefusedError
        async with outbox(session):
            charge.delay("o-3")
            await session.rollback()
            await session.commit()
            charge.delay("o-4")
        await session.close()

    run(work)
    assert (outbox_app.published(), outbox_app.effects.names()) == ([], [])
    assert not any(outbox_app.row("charge", f"o-{number}") for number in (1, 2, 3, 4))


@every_driver
def test_a_plain_call_is_recorded_by_the_commit(
    run: Callable[[Work], None], outbox_app: OutboxApp, publications: list[tuple[bool, bool]]
) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work(session: AsyncSession) -> None:
        async with outbox(session):
            plain = [charge.delay("o-1", 5), charge.delay("o-1", 5)]
            session.add(Effect(name="o-1"))
            awaited = await charge.adelay("o-2")
            assert ([result.duplicate for result in plain], awaited.duplicate) == ([None, None], False)
            await session.commit()
        assert [result.duplicate for result in plain] == [False, True]
        assert plain[0].id == plain[1].id == outbox_app.there("charge", "o-1").task_id

    run(work)
    assert outbox_app.published() == ["o-2", "o-1"]
    assert publications == [(True, False)] * 2


@some_drivers
@pytest.mark.parametrize("then", ["commit", "rollback"])
def test_a_plain_call_that_is_refused_raises_at_the_commit(
    run: Callable[[Work], None], outbox_app: OutboxApp, then: str
) -> None:
    charge, strict = (outbox_app.app.tasks[name] for name in ("charge", "strict"))
    strict.delay("o-1")
    charge.delay("o-2", 5)
    outbox_app.messages()

    async def work(session: AsyncSession) -> None:
        async with outbox(session):
            session.add(Effect(name="o-3"))
            refused = [strict.delay("o-1"), charge.delay("o-2", 7)]
            charge.delay("o-3")
            with pytest.raises(ExceptionGroup, match="2 of 3 calls of the session were not sent") as raised:
                await session.commit()
            kinds = [type(error) for error in raised.value.exceptions]
            assert kinds == [DuplicateMessageError, MessageMismatchError]
            assert [result.duplicate for result in refused] == [True, True]
            assert (outbox_app.published(), outbox_app.effects.names()) == ([], [])
            await getattr(session, then)()

    run(work)
    there = ["o-3"] if then == "commit" else []
    assert (outbox_app.published(), outbox_app.effects.names()) == (there, there)


@every_driver
def test_calls_in_savepoints_are_kept_as_far_as_these(run: Callable[[Work], None], outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def call(name: str) -> None:
        charge.delay(f"plain-{name}")
        await charge.adelay(f"awaited-{name}")

    async def work(session: AsyncSession) -> None:
        async with outbox(session):
            await call("before")
            with pytest.raises(RefusedError):  # noqa: PT012
                async with session.begin_nested():
                    await call("undone")
                    async with session.begin_nested():
                        await call("inner")
                    raise RefusedError
            async with session.begin_nested():
                await call("kept")
                nested = await session.begin_nested()
                await call("gone")
                await nested.rollback()
                await call("still")
            await session.commit()

    run(work)
    kept = ["before", "kept", "still"]
    assert outbox_app.published() == [*(f"awaited-{name}" for name in kept), *(f"plain-{name}" for name in kept)]
    for name in ("undone", "inner", "gone"):
        assert outbox_app.row("charge", f"plain-{name}") is outbox_app.row("charge", f"awaited-{name}") is None


@every_driver
def test_a_session_may_be_committed_after_the_block(run: Callable[[Work], None], outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work(session: AsyncSession) -> None:
        async with outbox(session):
            charge.delay("o-1")
            await charge.adelay("o-2")
        session.add(Effect(name="o-1"))
        assert outbox_app.published() == []
        await session.commit()
        assert outbox_app.published() == ["o-2", "o-1"]
        async with outbox(session), session.begin():
            await charge.adelay("o-3")
        assert outbox_app.published() == ["o-3"]

    run(work)


@pytest.mark.parametrize(("store_url", "driver"), DRIVERS[1:4], indirect=["store_url"])
def test_two_sessions_have_an_outbox_each(
    engine: AsyncEngine, run: Callable[[Work], None], outbox_app: OutboxApp
) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work(outer: AsyncSession) -> None:
        async with AsyncSession(engine) as inner, outbox(outer):
            charge.delay("outer-1")
            async with outbox(inner):
                await charge.adelay("inner-1")
                charge.delay("inner-2")
            await charge.adelay("outer-2")
            await inner.rollback()
            await outer.commit()
            assert outbox_app.published() == ["outer-2", "outer-1"]
        assert outbox_app.row("charge", "inner-1") is outbox_app.row("charge", "inner-2") is None

        async def place(number: int) -> None:
            async with AsyncSession(engine) as session, outbox(session), session.begin():
                session.add(Effect(name=f"o-{number}"))
                await charge.adelay(f"o-{number}")
                await asyncio.sleep(0.05)
                charge.delay(f"p-{number}")
                if number % 2:
                    await session.rollback()

        await asyncio.gather(*(place(number) for number in range(6)), return_exceptions=True)
        assert sorted(outbox_app.published()) == ["o-0", "o-2", "o-4", "p-0", "p-2", "p-4"]

    run(work)
    assert sorted(outbox_app.effects.names()) == ["o-0", "o-2", "o-4"]


@some_drivers
def test_a_task_of_the_loop_that_outlives_the_block_is_sent(run: Callable[[Work], None], outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work(session: AsyncSession) -> None:
        left = asyncio.Event()

        async def later() -> None:
            await left.wait()
            charge.delay("late-1")
            await charge.adelay("late-2")

        async with outbox(session):
            outliving = asyncio.create_task(later())
            inside = asyncio.create_task(charge.adelay("inside"))
            await inside
            await session.rollback()
        left.set()
        await outliving
        assert not session.in_transaction()

    run(work)
    assert outbox_app.published() == ["late-1", "late-2"]
    assert outbox_app.row("charge", "inside") is None
    assert outbox_app.there("charge", "late-1").published_at is not None


@every_driver
def test_batches_and_canvases_join_the_session(run: Callable[[Work], None], outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]

    def canvas(name: str) -> Any:
        return group([charge.s(f"{name}-1"), charge.s(f"{name}-2")], app=outbox_app.app)

    async def work(session: AsyncSession) -> None:
        async with outbox(session):
            async with outbox():
                charge.delay("awaited-batch")
            assert (await charge.adelay("awaited-batch")).duplicate is True, "it is recorded"
            with outbox():
                charge.delay("batch")
            canvas("plain").delay()
            await session.run_sync(lambda _: canvas("awaited").delay())
            assert (await charge.adelay("awaited-1")).duplicate is True
            assert outbox_app.published() == []
            await session.commit()

    run(work)
    assert outbox_app.published() == ["awaited-batch", "awaited-1", "awaited-2", "batch", "plain-1", "plain-2"]


@some_drivers
def test_a_commit_whose_await_is_cancelled_publishes_to_the_end(
    run: Callable[[Work], None], outbox_app: OutboxApp
) -> None:
    charge = outbox_app.app.tasks["charge"]
    reached, go_on = threading.Event(), threading.Event()

    def wait(**_: Any) -> None:
        reached.set()
        assert go_on.wait(30)

    async def work(session: AsyncSession) -> None:
        ticks = 0
        async with outbox(session):
            session.add(Effect(name="o-1"))
            await charge.adelay("o-1")
            charge.delay("o-2")
            commit = asyncio.create_task(session.commit())
            async with asyncio.timeout(30):
                while not reached.is_set():  # noqa: ASYNC110 - a thread sets it
                    await asyncio.sleep(0.01)
            for _ in range(20):  # while the broker takes its time, the loop goes on
                await asyncio.sleep(0.01)
                ticks += 1
            assert not commit.done()
            commit.cancel()
            with pytest.raises(asyncio.CancelledError):
                await commit
        go_on.set()
        await session.close()
        async with session.begin():
            assert (await session.scalar(sa.select(sa.func.count()).select_from(Effect))) == 1
        async with asyncio.timeout(30):
            while outbox_app.store.unsent(limit=9):  # noqa: ASYNC110 - another thread notes it
                await asyncio.sleep(0.01)

    before_task_publish.connect(wait)
    try:
        run(work)
    finally:
        before_task_publish.disconnect(wait)
    assert outbox_app.published() == ["o-1", "o-2"]


@pytest.mark.parametrize(("store_url", "driver"), DRIVERS[1:], indirect=["store_url"])
def test_a_cancelled_call_is_not_sent_without_the_commit(
    engine: AsyncEngine, run: Callable[[Work], None], outbox_app: OutboxApp
) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work(session: AsyncSession) -> None:
        async with AsyncSession(engine) as holder, outbox(holder):
            await charge.adelay("o-1")
            async with outbox(session):
                waiting = asyncio.create_task(charge.adelay("o-1"))
                await asyncio.sleep(0.3)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                await session.rollback()
                await charge.adelay("o-2")
                await session.commit()
            assert outbox_app.published() == ["o-2"]
            await holder.commit()

    run(work)
    assert outbox_app.published() == ["o-1"]


@pytest.mark.parametrize(("store_url", "driver"), DRIVERS[1:2], indirect=["store_url"])
def test_a_commit_does_not_wait_for_calls_that_wait_for_a_transaction(
    engine: AsyncEngine, run: Callable[[Work], None], outbox_app: OutboxApp
) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work(session: AsyncSession) -> None:
        async with AsyncSession(engine) as holder, outbox(holder):
            await charge.adelay("o-1")
            context = contextvars.Context()  # outside of the block
            calls = [asyncio.create_task(charge.adelay("o-1"), context=context) for _ in range(2 * AT_ONCE)]
            await asyncio.sleep(0.3)
            async with asyncio.timeout(5), outbox(session):
                await charge.adelay("o-2")
                await session.commit()
            assert outbox_app.published() == ["o-2"]
            assert not any(call.done() for call in calls)
            await holder.commit()
        assert all(result.duplicate for result in await asyncio.gather(*calls))

    run(work)
    assert outbox_app.published() == ["o-1"]


@some_drivers
def test_eager_bodies_run_after_the_commit(run: Callable[[Work], None], outbox_app: OutboxApp) -> None:
    outbox_app.app.conf.task_always_eager = True
    ran: list[tuple[str, bool]] = []

    def body(name: str) -> None:
        ran.append((name, threading.current_thread() is threading.main_thread()))

    task = outbox_app.task(body, message_id="{name}")

    async def work(session: AsyncSession) -> None:
        async with outbox(session):
            await task.adelay("awaited")
            task.delay("plain")
            assert ran == []
            await session.commit()

    run(work)
    assert ran == [("awaited", False), ("plain", False)]
    assert outbox_app.there("body", "plain").processed_status is ProcessedStatus.SUCCESS


@some_drivers
def test_the_broker_may_be_away_at_the_commit(run: Callable[[Work], None], outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work(session: AsyncSession) -> None:
        async with outbox(session):
            await charge.adelay("o-1")
            charge.delay("o-2")
            await session.commit()

    with outbox_app.broken_broker() as offered:
        run(work)
    assert offered == ["o-1"]
    assert [row.key.message_id for row in outbox_app.store.unsent(limit=9)] == ["o-1", "o-2"]


@pytest.mark.parametrize(("store_url", "driver"), DRIVERS[:1], indirect=["store_url"])
def test_what_cannot_be_entered_says_what_to_write(engine: AsyncEngine, outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]

    @asynccontextmanager
    async def registry() -> AsyncIterator[Any]:
        scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
        yield scoped
        await scoped.remove()

    async def work() -> None:
        async with AsyncSession(engine) as session:
            with pytest.raises(ConfigurationError, match="async with"), outbox(session):
                pass
        async with engine.connect() as connection:
            with pytest.raises(ConfigurationError, match="run_sync"):
                outbox(connection)  # type: ignore[arg-type]
        async with registry() as session, outbox(session):
            await charge.adelay("o-1")
            await session.commit()
        with Session(outbox_app.effects.engine) as plain:
            async with outbox(plain):
                await charge.adelay("o-2")
                plain.commit()

    asyncio.run(work())
    assert outbox_app.published() == ["o-1", "o-2"]


def test_a_plain_session_needs_no_greenlets(tmp_path: Path) -> None:
    """SQLAlchemy 2.1 does not bring them any more."""
    program = """
import sys
sys.modules["greenlet"] = None
from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from celery_idempotent import IdempotentTask, outbox
app = Celery("shop", broker="memory://")
app.conf.idempotent_store = "sqlite:///shop.db"
@app.task(base=IdempotentTask, message_id="{order}")
def charge(order):
    pass
with Session(create_engine("sqlite:///shop.db")) as session, outbox(session):
    charge.delay("o-1")
    session.commit()
    print(charge.delay("o-1").duplicate)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


KILLED = """
import asyncio, os, signal, sys
from celery import Celery
from celery.signals import before_task_publish
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from celery_idempotent import IdempotentTask, outbox
from tests.support.effects import Effect
url, options, store, queue, when = sys.argv[1:]
app = Celery("outbox_app", broker="memory://")
app.conf.task_default_queue = queue
app.conf.idempotent_store = store
@app.task(base=IdempotentTask, name="charge", message_id="{order}")
def charge(order, amount=0):
    pass
def kill(**_):
    os.kill(os.getpid(), signal.SIGKILL)
before_task_publish.connect(kill)
async def work():
    engine = create_async_engine(url, poolclass=NullPool, connect_args=eval(options))
    async with AsyncSession(engine) as session, outbox(session):
        session.add(Effect(name="o-1"))
        await charge.adelay("o-1")
        charge.delay("o-2")
        if when == "before the commit":
            kill()
        await session.commit()
asyncio.run(work())
"""


@every_driver
@pytest.mark.parametrize("when", ["before the commit", "after it"])
def test_a_process_that_is_killed_leaves_both_or_nothing(
    engine: AsyncEngine, store_url: str, outbox_app: OutboxApp, when: str
) -> None:
    url = engine.url.render_as_string(hide_password=False)
    options = "{}"
    if engine.url.get_driver_name() == "asyncpg":
        path = str(sa.make_url(store_url).query["options"]).partition("=")[2]
        options = repr({"server_settings": {"search_path": path}})
    command = [sys.executable, "-c", KILLED, url, options, store_url, outbox_app.queue, when]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL

    after = when == "after it"
    assert outbox_app.effects.names() == (["o-1"] if after else [])
    with outbox_app.store.engine.begin() as connection:  # only who recorded it may publish it for some seconds
        connection.exec_driver_sql("UPDATE queue_log SET lease_expires_at = created_timestamp")
    assert [row.key.message_id for row in outbox_app.store.unsent(limit=9)] == (["o-1", "o-2"] if after else [])
    assert relay(outbox_app.app.queue_log).published == (2 if after else 0)
    assert outbox_app.published() == (["o-1", "o-2"] if after else [])
