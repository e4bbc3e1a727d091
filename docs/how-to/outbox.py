# What outbox.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN001, ANN201, D100, D101, D103, F401, F821, I001, INP001, PT018

# %% before block 1

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
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


class FlaskBase(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=FlaskBase)
Order = type(
    "Order",
    (db.Model,),
    {
        "__annotations__": {"id": Mapped[int], "amount": Mapped[int]},
        "id": mapped_column(primary_key=True),
        "__tablename__": "site_orders",
    },
)
site = Flask("shop")
site.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{engine.url.database}"
site.instance_path = "."
db.init_app(site)
with site.app_context():
    db.create_all()
    db.session.add(Order(id=7, amount=1))
    db.session.commit()

# %% after block 4
assert site.test_client().post("/orders/500").text == "8"
assert "order:8" in charged() and all_published()
with site.app_context():
    db.engine.dispose()
app.queue_log.close()
app.close()
engine.dispose()
