# What fastapi.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN001, ANN201, ANN202, D100, D101, D103, F401, F821, I001, INP001

# %% before block 1
import asyncio
from typing import Annotated

import httpx
from fastapi import Depends, FastAPI
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from celery_idempotent import outbox
from celery_idempotent.records import RowFilter


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


app.conf.idempotent_store = "sqlite:///shop.db"
engine = create_engine(app.conf.idempotent_store)
Base.metadata.create_all(engine)
site = FastAPI()


@app.task(base=IdempotentTask, message_id="order:{order_id}")
def charge(order_id):
    pass


def charged():
    return {row.key.message_id for row in app.queue_log.store.rows(RowFilter())}


def all_published():
    return not app.queue_log.store.unsent(limit=9)


def post(path):
    async def ask():
        transport = httpx.ASGITransport(site)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            return await client.post(path)

    return asyncio.run(ask())


# %% after block 1
assert post("/orders/by-dependency").status_code == 200
assert charged() == {"order:by-dependency"}
assert all_published()

site = FastAPI()


async def open_session():
    asynchronous = create_async_engine("sqlite+aiosqlite:///shop.db")
    async with AsyncSession(asynchronous) as session:
        yield session
    await asynchronous.dispose()


# %% after block 2
assert post("/orders/asynchronous").status_code == 200
assert "order:asynchronous" in charged()
assert all_published()

# %% after block 3
asyncio.run(pay("in-a-thread"))
assert "order:in-a-thread" in charged()
app.queue_log.close()
app.close()
engine.dispose()
