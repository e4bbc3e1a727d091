"""Litestar: an order and its message in one commit, by an asynchronous session from a dependency."""

# Litestar reads annotations when a handler is made, so they must not be postponed.

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
import sqlalchemy as sa
from litestar import Litestar, post
from litestar.di import NamedDependency, Provide
from litestar.params import FromPath
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from celery_idempotent import outbox
from tests.integration.frameworks.conftest import OutboxApp
from tests.support.effects import Effect

pytestmark = pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def site(store_url: str, outbox_app: OutboxApp) -> Litestar:
    charge = outbox_app.app.tasks["charge"]
    url = sa.make_url(store_url)
    if url.get_backend_name() == "sqlite":
        url = url.set(drivername="sqlite+aiosqlite")
    engine = create_async_engine(url, poolclass=sa.NullPool)

    async def open_session() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(engine) as session:
            yield session

    async def commit_session() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(engine) as session, session.begin():
            yield session

    @post("/orders/{order:str}", dependencies={"session": Provide(open_session)})
    async def place(order: FromPath[str], session: NamedDependency[AsyncSession]) -> bool:
        async with outbox(session):
            session.add(Effect(name=order))
            result = await charge.adelay(order)
            assert outbox_app.messages() == []
            if order == "refused":
                raise ValueError("no such order")
            if result.duplicate:
                await session.rollback()
            await session.commit()
        return bool(result.duplicate)

    @post("/committed-by-dependency/{order:str}", dependencies={"session": Provide(commit_session)})
    async def record(order: FromPath[str], session: NamedDependency[AsyncSession]) -> None:
        async with outbox(session):
            session.add(Effect(name=order))
            charge.delay(order)
        if order == "refused":
            raise ValueError("no such order")

    @post("/payments/{order:str}")
    async def pay(order: FromPath[str]) -> bool:
        return bool((await charge.adelay(order)).duplicate)

    return Litestar([place, record, pay], logging_config=None)


def ask(site: Litestar, path: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(site, raise_app_exceptions=False)  # type: ignore[arg-type] # of other ASGI types
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            return await client.post(path)

    return asyncio.run(send())


@pytest.mark.parametrize("path", ["orders", "committed-by-dependency"])
def test_a_handler_commits_order_and_message_together(site: Litestar, outbox_app: OutboxApp, path: str) -> None:
    assert ask(site, f"/{path}/refused").status_code == 500
    assert (outbox_app.published(), outbox_app.effects.names()) == ([], [])
    assert outbox_app.row("charge", "refused") is None
    assert ask(site, f"/{path}/o-1").status_code == 201
    assert (outbox_app.published(), outbox_app.effects.names()) == (["o-1"], ["o-1"])
    assert outbox_app.store.unsent(limit=9) == []


def test_a_handler_knows_the_duplicate(site: Litestar, outbox_app: OutboxApp) -> None:
    assert ask(site, "/orders/o-1").json() is False
    assert outbox_app.published() == ["o-1"]
    assert ask(site, "/orders/o-1").json() is True
    assert [ask(site, f"/payments/{order}").json() for order in ("o-1", "o-2", "o-2")] == [True, False, True]
    assert (outbox_app.published(), outbox_app.effects.names()) == (["o-2"], ["o-1"])
