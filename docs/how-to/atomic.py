# What atomic.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN001, ANN201, ARG001, D100, D101, D102, D103, F401, F821, INP001, N801, N805, SLF001

# %% before block 1
from sqlalchemy import Column, MetaData, String, Table, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

app.conf.idempotent_store = "sqlite:///shop.db"
engine = create_engine(app.conf.idempotent_store)


class Base(DeclarativeBase):
    pass


class Payment(Base):
    __tablename__ = "payments"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str]


entries = Table("entries", Base.metadata, Column("order_id", String))
Base.metadata.create_all(engine)


@app.task(base=IdempotentTask)
def notify(order_id):
    pass


def count(table):
    with engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(table))


# %% after block 1
assert settle.apply(("o-1",)).successful()
assert count(entries) == count(Payment) == 1
app.tasks.pop(settle.name)

app.queue_log.close()

# %% after block 3
assert settle.apply(("o-2",)).successful()
assert count(Payment) == 2
assert count(app.queue_log.store._table) == 3

# %% after block 4
keys = []


class provider:
    def charge(amount, idempotency_key):
        keys.append(idempotency_key)


@app.task(base=IdempotentTask, message_id="order:{order_id}")
def charge(order_id, amount):
    pay(amount)


charge.apply(("o-1", 500)).get()
assert keys == ["shop.charge:order:o-1"]
app.queue_log.close()
app.close()
engine.dispose()
