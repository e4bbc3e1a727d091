# What fastapi.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN001, ANN201, ANN202, D100, D101, D103, F401, F821, I001, INP001

# %% before block 1
import asyncio
from typing import Annotated

import httpx
import sqlalchemy
from celery import group
from fastapi import Depends, FastAPI
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from celery_idempotent import outbox
from celery_idempotent.records import RowFilter


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


app.conf.idempotent_store = "sqlite+aiosqlite:///shop.db"
engine = create_engine("sqlite:///shop.db")
async_engine = create_async_engine("sqlite+aiosqlite:///shop.db", poolclass=sqlalchemy.NullPool)
Base.metadata.create_all(engine)
site = FastAPI()


@app.task(base=IdempotentTask, message_id="order:{order_id}")
def charge(order_id):
    pass


def charged():
    return {row.key.message_id for row in app.queue_log.store.rows(RowFilter())}


def all_published():
    return not app.queue_log.store.unsent(limit=9)


def post(path, site=None):
    async def ask():
        transport = httpx.ASGITransport(site or globals()["site"])
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            return await client.post(path)

    return asyncio.run(ask())


async def open_session():
    async with AsyncSession(async_engine) as session:
        yield session


# %% after block 1
assert [asyncio.run(pay("o-1")), asyncio.run(pay("o-1"))] == [False, True]
assert charged() == {"order:o-1"}

# %% after block 2
assert [post("/orders/asynchronous").json() for _ in range(2)] == [{"duplicate": False}, {"duplicate": True}]
assert "order:asynchronous" in charged()
assert all_published()

# %% after block 3
asyncio.run(pay_all(["by-thread"]))


async def in_a_session():
    async with AsyncSession(async_engine) as session:
        await pay_all_with(session, ["by-session"])


asyncio.run(in_a_session())
assert {"order:by-thread", "order:by-session"} <= charged()
assert all_published()

# %% after block 4
assert asyncio.run(pay_many(["m-1", "m-2", "m-1"])) == [False, False, True]

# %% after block 5
assert post("/plain-orders/by-dependency").status_code == 200
assert "order:by-dependency" in charged()
assert all_published()

# %% after block 6
assert post("/orders/by-starlette", starlette_site).text == "by-starlette"
assert "order:by-starlette" in charged()
assert all_published()
app.queue_log.close()
app.close()
engine.dispose()
