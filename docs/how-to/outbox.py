# What outbox.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN001, ANN201, D100, D101, D103, F401, F821, I001, INP001

# %% before block 1

from sqlalchemy import create_engine, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from celery_idempotent.records import RowFilter


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]


app.conf.idempotent_store = "sqlite:///shop.db"
engine = create_engine(app.conf.idempotent_store)
Base.metadata.create_all(engine)
orders = Order.__table__


@app.task(base=IdempotentTask, message_id="order:{order_id}")
def charge(order_id, amount=1):
    pass


def charged():
    return {row.key.message_id for row in app.queue_log.store.rows(RowFilter())}


def all_published():
    return not app.queue_log.store.unsent(limit=9)


session, order = Session(engine), Order(name="first")

# %% after block 1
assert charged() == {"order:1"}
assert all_published()
names = [f"o-{number}" for number in range(1000)]

# %% after block 2
assert len(new) == 999
assert all_published()

# %% after block 3
assert result.duplicate
session.close()
app.queue_log.close()
app.close()
engine.dispose()
