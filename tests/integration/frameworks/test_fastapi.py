"""FastAPI and Starlette: plain sessions from a dependency, and asynchronous ones, as they are or in a function for ``run_sync``."""

# FastAPI reads annotations when an endpoint is made; they name what is local to a fixture, and so must not be postponed.

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import pytest
import sqlalchemy as sa
from celery.signals import after_task_publish
from fastapi import Depends, FastAPI, Request, Response
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from celery_idempotent import ConfigurationError, outbox
from tests.integration.frameworks.conftest import OutboxApp
from tests.support.effects import Effect

#: Of those whose asynchronous drivers are installed.
asynchronous = pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)


def post(site: FastAPI, path: str) -> httpx.Response:
    """Return a request, from its beginning to the end of its dependencies."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(site, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            return await client.post(path)

    return asyncio.run(ask())


@pytest.fixture
def visible(outbox_app: OutboxApp) -> Iterator[list[tuple[str, bool]]]:
    """Each message that was published, and whether others saw its row and its effect then."""
    seen: list[tuple[str, bool]] = []

    def look(*, body: Any, **_: Any) -> None:
        order = body[0][0]
        seen.append((order, outbox_app.row("charge", order) is not None and order in outbox_app.effects.names()))

    after_task_publish.connect(look, weak=False)
    yield seen
    after_task_publish.disconnect(look)


# -- plain sessions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_site(store_url: str, outbox_app: OutboxApp) -> Iterator[FastAPI]:
    charge = outbox_app.app.tasks["charge"]
    engine = sa.create_engine(store_url)

    def open_session() -> Iterator[Session]:
        with Session(engine) as session:
            yield session

    def commit_session() -> Iterator[Session]:
        with Session(engine) as session, session.begin():
            yield session

    site = FastAPI()

    @site.post("/orders/{order}")
    def place(order: str, session: Annotated[Session, Depends(open_session)], fail: bool = False) -> None:
        with outbox(session):
            session.add(Effect(name=order))
            charge.delay(order)
            assert outbox_app.messages() == []
            if fail:
                raise ValueError("no such order")
            session.commit()

    @site.post("/committed-by-dependency/{order}")
    def record(
        order: str, session: Annotated[Session, Depends(commit_session, scope="function")], fail: bool = False
    ) -> None:
        with outbox(session):
            session.add(Effect(name=order))
            charge.delay(order)
        assert outbox_app.messages() == []
        if fail:
            raise ValueError("no such order")

    yield site
    engine.dispose()


@pytest.mark.parametrize("path", ["orders", "committed-by-dependency"])
def test_an_endpoint_publishes_when_its_session_commits(
    plain_site: FastAPI, outbox_app: OutboxApp, visible: list[tuple[str, bool]], path: str
) -> None:
    for order in ("o-1", "o-2"):
        assert post(plain_site, f"/{path}/{order}").status_code == 200
        assert outbox_app.published() == [order]
    assert visible == [("o-1", True), ("o-2", True)]


@pytest.mark.parametrize("path", ["orders", "committed-by-dependency"])
def test_an_endpoint_that_fails_leaves_neither_effect_nor_message(
    plain_site: FastAPI, outbox_app: OutboxApp, path: str
) -> None:
    assert post(plain_site, f"/{path}/o-1?fail=true").status_code == 500
    assert (outbox_app.published(), outbox_app.row("charge", "o-1"), outbox_app.effects.names()) == ([], None, [])
    assert post(plain_site, f"/{path}/o-1").status_code == 200
    assert outbox_app.published() == ["o-1"]


@pytest.mark.parametrize("path", ["orders", "in-a-function"])
def test_a_block_in_a_dependency_without_async_is_refused(store_url: str, outbox_app: OutboxApp, path: str) -> None:
    """FastAPI runs it in a copy of the context: the endpoint would not be in the block, and its calls be published at once."""
    charge = outbox_app.app.tasks["charge"]
    engine = sa.create_engine(store_url)

    def open_session() -> Iterator[Session]:
        with Session(engine) as session, outbox(session):
            yield session

    site = FastAPI()
    told: list[str] = []

    @site.exception_handler(ConfigurationError)
    async def tell(_: Request, error: ConfigurationError) -> Response:
        told.append(str(error))
        return Response(status_code=500)

    @site.post("/orders/{order}")
    def place(order: str, session: Annotated[Session, Depends(open_session)]) -> None:
        charge.delay(order)
        session.rollback()

    @site.post("/in-a-function/{order}")
    def record(order: str) -> None:
        with contextmanager(open_session)() as session:
            charge.delay(order)
            assert outbox_app.published() == []
            session.commit()

    answer = post(site, f"/{path}/o-1")
    refused = path == "orders"
    assert answer.status_code == (500 if refused else 200)
    assert ["async def" in text for text in told] == [True] * refused
    assert outbox_app.published() == ([] if refused else ["o-1"])
    engine.dispose()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_block_in_a_dependency_with_async_is_around_the_endpoint(
    store_url: str, outbox_app: OutboxApp, end: str
) -> None:
    charge = outbox_app.app.tasks["charge"]
    engine = sa.create_engine(store_url)

    async def open_session() -> AsyncIterator[Session]:
        with Session(engine) as session, outbox(session):
            yield session

    site = FastAPI()

    @site.post("/orders/{order}")
    def place(order: str, session: Annotated[Session, Depends(open_session)]) -> None:
        session.add(Effect(name=order))
        charge.delay(order)
        assert outbox_app.published() == []
        getattr(session, end)()

    assert post(site, "/orders/o-1").status_code == 200
    assert outbox_app.published() == (["o-1"] if end == "commit" else [])
    engine.dispose()


# -- asynchronous sessions --------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(store_url: str) -> AsyncEngine:
    url = sa.make_url(store_url)
    if url.get_backend_name() == "sqlite":
        url = url.set(drivername="sqlite+aiosqlite")
    # A pool would be bound to the event loop of one request.
    return create_async_engine(url, poolclass=sa.NullPool)


@pytest.fixture
def async_site(engine: AsyncEngine, outbox_app: OutboxApp) -> FastAPI:
    charge = outbox_app.app.tasks["charge"]

    async def open_session() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(engine) as session:
            yield session

    site = FastAPI()

    @site.post("/awaited/{order}")
    async def place_awaited(
        order: str, session: Annotated[AsyncSession, Depends(open_session)], fail: bool = False
    ) -> bool:
        async with outbox(session):
            session.add(Effect(name=order))
            result = await charge.adelay(order)
            assert outbox_app.messages() == []
            if fail:
                raise ValueError("no such order")
            if result.duplicate:
                await session.rollback()
            await session.commit()
        return bool(result.duplicate)

    @site.post("/plain/{order}")
    async def place_plain(
        order: str, session: Annotated[AsyncSession, Depends(open_session)], fail: bool = False
    ) -> bool:
        async with outbox(session):
            session.add(Effect(name=order))
            result = charge.delay(order)
            if fail:
                raise ValueError("no such order")
            await session.commit()
        return bool(result.duplicate)

    async def open_block(session: Annotated[AsyncSession, Depends(open_session)]) -> AsyncIterator[AsyncSession]:
        async with outbox(session), session.begin():
            yield session

    @site.post("/dependency/{order}")
    async def place_in_dependency(
        order: str, session: Annotated[AsyncSession, Depends(open_block, scope="function")], fail: bool = False
    ) -> bool:
        session.add(Effect(name=order))
        result = await charge.adelay(order)
        if fail:
            raise ValueError("no such order")
        return bool(result.duplicate)

    async def place_in_starlette(request: Request) -> Response:
        order = request.path_params["order"]
        async with AsyncSession(engine) as session, outbox(session):
            session.add(Effect(name=order))
            result = await charge.adelay(order)
            if "fail" in request.query_params:
                raise ValueError("no such order")
            await session.commit()
        return JSONResponse(result.duplicate)

    site.mount("/starlette", Starlette(routes=[Route("/{order}", place_in_starlette, methods=["POST"])]))

    @site.post("/orders/{order}")
    async def place(order: str, session: Annotated[AsyncSession, Depends(open_session)], fail: bool = False) -> None:
        def record(session: Session) -> None:
            with outbox(session):
                session.add(Effect(name=order))
                charge.delay(order)

        await session.run_sync(record)
        assert outbox_app.messages() == []
        if fail:
            raise ValueError("no such order")
        await session.commit()

    return site


every_way = pytest.mark.parametrize("path", ["orders", "awaited", "plain", "dependency", "starlette"])


@asynchronous
@every_way
def test_an_async_endpoint_publishes_after_its_commit(
    async_site: FastAPI, outbox_app: OutboxApp, visible: list[tuple[str, bool]], path: str
) -> None:
    for order in ("o-1", "o-2"):
        assert post(async_site, f"/{path}/{order}").status_code == 200
        assert outbox_app.published() == [order]
    assert visible == [("o-1", True), ("o-2", True)]
    assert outbox_app.store.unsent(limit=9) == []


@asynchronous
@every_way
def test_an_asynchronous_endpoint_that_fails_leaves_neither_effect_nor_message(
    async_site: FastAPI, outbox_app: OutboxApp, path: str
) -> None:
    assert post(async_site, f"/{path}/o-1?fail=true").status_code == 500
    assert (outbox_app.published(), outbox_app.row("charge", "o-1"), outbox_app.effects.names()) == ([], None, [])
    assert post(async_site, f"/{path}/o-1").status_code == 200
    assert outbox_app.published() == ["o-1"]


@asynchronous
def test_a_duplicate_is_known_to_the_endpoint(async_site: FastAPI, outbox_app: OutboxApp) -> None:
    assert post(async_site, "/awaited/o-1").json() is False
    assert (outbox_app.published(), outbox_app.effects.names()) == (["o-1"], ["o-1"])
    assert [post(async_site, f"/{path}/o-1").json() for path in ("awaited", "plain")] == [True, True]
    assert outbox_app.published() == []


@asynchronous
def test_duplicates_savepoints_and_batches_are_what_they_are_in_a_plain_session(
    engine: AsyncEngine, outbox_app: OutboxApp
) -> None:
    charge = outbox_app.app.tasks["charge"]

    def record(session: Session) -> list[bool]:
        with outbox(session):
            results = [charge.delay("o-1"), charge.delay("o-1")]
            with session.begin_nested() as savepoint:
                charge.delay("undone")
                savepoint.rollback()
            with outbox():
                results += [charge.delay("o-2"), charge.delay("o-3")]
        return [result.duplicate for result in results]

    async def work() -> None:
        async with AsyncSession(engine) as session, session.begin():
            assert await session.run_sync(record) == [False, True, False, False]
            assert outbox_app.published() == []

    asyncio.run(work())
    assert outbox_app.published() == ["o-1", "o-2", "o-3"]
    assert outbox_app.row("charge", "undone") is None


@asynchronous
def test_a_waiting_block_takes_no_calls_of_other_coroutines(engine: AsyncEngine, outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]

    async def work() -> None:
        inside, called = asyncio.Event(), asyncio.Event()

        def record(session: Session) -> None:
            with outbox(session):
                inside.set()
                await_only(called.wait())  # as for an answer of the database
                charge.delay("recorded")

        async def block() -> None:
            async with AsyncSession(engine) as session:
                await session.run_sync(record)
                assert outbox_app.published() == []
                await session.rollback()

        blocked = asyncio.create_task(block())
        await inside.wait()
        charge.delay("sent")
        assert outbox_app.published() == ["sent"]
        called.set()
        await blocked

    asyncio.run(work())
    assert outbox_app.published() == []
    assert outbox_app.row("charge", "recorded") is None
