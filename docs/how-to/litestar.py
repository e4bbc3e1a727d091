# What litestar.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN001, ANN201, ANN202, D100, D101, D103, F401, F821, I001, INP001

# %% before block 1
import asyncio
from collections.abc import AsyncIterator

import httpx
from litestar import Litestar, post
from litestar.di import NamedDependency, Provide
from litestar.params import FromPath
from sqlalchemy import NullPool, create_engine
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


app.conf.idempotent_store = "sqlite+aiosqlite:///shop.db"
engine = create_async_engine("sqlite+aiosqlite:///shop.db", poolclass=NullPool)
plain_engine = create_engine("sqlite:///shop.db")
Base.metadata.create_all(plain_engine)


@app.task(base=IdempotentTask, message_id="order:{order_id}")
def charge(order_id):
    pass


def charged():
    return {row.key.message_id for row in app.queue_log.store.rows(RowFilter())}


def ask(site, path):
    async def send():
        transport = httpx.ASGITransport(site)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            return await client.post(path)

    return asyncio.run(send())


# %% after block 1
assert [ask(site, "/orders/o-1").json() for _ in range(2)] == [{"duplicate": False}, {"duplicate": True}]
assert charged() == {"order:o-1"}

# %% after block 2
site = Litestar([pay])
assert [ask(site, "/payments/o-2").json() for _ in range(2)] == [{"duplicate": False}, {"duplicate": True}]

# %% after block 3
assert ask(Litestar([place_plainly]), "/plain-orders/o-3").status_code == 201
assert charged() == {"order:o-1", "order:o-2", "order:o-3"}
assert not app.queue_log.store.unsent(limit=9)
app.queue_log.close()
app.close()
plain_engine.dispose()
