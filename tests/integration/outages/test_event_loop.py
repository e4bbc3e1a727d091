"""Awaited calls while a server is frozen: the event loop goes on, and each call is sent once the server is back."""

from __future__ import annotations

import asyncio
import time

import pytest
import sqlalchemy as sa
from celery import Celery
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from celery_idempotent import outbox
from celery_idempotent.core.records import RowFilter
from tests.support.servers import PrivatePostgreSQL, PrivateRedis, PrivateServer
from tests.support.ticking import STILL, ticking

#: Seconds for which the server is frozen: less than it is waited for.
FROZEN = 1.7

away = pytest.mark.parametrize("away", ["store", "broker"])


@pytest.fixture
def server(away: str, postgresql: PrivatePostgreSQL, private_redis: PrivateRedis) -> PrivateServer:
    return postgresql if away == "store" else private_redis


async def freeze(server: PrivateServer) -> asyncio.Task[None]:
    """Freeze a server; return the task that brings it back."""
    await asyncio.to_thread(server.pause)

    async def resume() -> None:
        await asyncio.sleep(FROZEN)
        await asyncio.to_thread(server.resume)

    return asyncio.create_task(resume())


@away
def test_awaited_calls_leave_the_loop_alone(app: Celery, server: PrivateServer) -> None:
    add = app.tasks["add"]

    async def work() -> None:
        await add.adelay(1, 1)
        async with ticking() as pauses:
            back = await freeze(server)
            calls = [asyncio.create_task(add.adelay(number, 2)) for number in range(30)]
            await asyncio.sleep(FROZEN / 2)
            assert not any(call.done() for call in calls)
            results = await asyncio.gather(*calls)
            await back
        assert [result.duplicate for result in results] == [False] * 30
        assert max(pauses) < STILL
        assert sum(pauses) > FROZEN

    asyncio.run(work())
    assert len(list(app.queue_log.store.rows(RowFilter()))) == 31


@away
def test_the_commit_of_an_asynchronous_session_leaves_the_loop_alone(
    app: Celery, server: PrivateServer, postgresql: PrivatePostgreSQL
) -> None:
    add = app.tasks["add"]
    url = sa.make_url(postgresql.url).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, poolclass=sa.NullPool)

    async def work() -> None:
        async with AsyncSession(engine) as session, outbox(session):
            await add.adelay(1, 1)
            await session.commit()
            async with ticking() as pauses:
                await add.adelay(1, 2)
                add.delay(1, 3)
                back = await freeze(server)
                await session.commit()
                await back
            assert max(pauses) < STILL
            assert sum(pauses) > FROZEN

    asyncio.run(work())
    assert app.queue_log.store.unsent(limit=9) == []
    assert len(list(app.queue_log.store.rows(RowFilter()))) == 3


@pytest.mark.parametrize("away", ["store"])
def test_a_plain_call_would_hold_the_loop(app: Celery, server: PrivateServer) -> None:
    """By the same measure, so that it is one."""
    add = app.tasks["add"]

    async def work() -> None:
        add.delay(1, 1)
        async with ticking() as pauses:
            await asyncio.to_thread(server.pause)
            thread = asyncio.get_running_loop().run_in_executor(None, resume_after, server)
            add.delay(1, 2)
            await thread
            await asyncio.sleep(0.05)  # so that the ticker's turn comes
        assert max(pauses) > STILL

    asyncio.run(work())


def resume_after(server: PrivateServer) -> None:
    time.sleep(FROZEN)
    server.resume()
