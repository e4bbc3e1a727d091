# What flask.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN001, ANN201, D100, D101, D103, F401, F821, I001, INP001

# %% before block 1
from pathlib import Path

from celery import Celery
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from celery_idempotent import DuplicateMessageError, QueueLog, SQLStore, outbox
from celery_idempotent.records import RowFilter


class FlaskBase(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=FlaskBase)
Order = type(
    "Order",
    (db.Model,),
    {
        "__annotations__": {"id": Mapped[int], "name": Mapped[str], "amount": Mapped[int]},
        "id": mapped_column(primary_key=True),
        "__tablename__": "orders",
    },
)
site = Flask("shop")

site.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{Path('site.db').resolve()}"
db.init_app(site)
with site.app_context():
    db.create_all()

# %% after block 1
celery_app.conf.broker_url = "memory://"

# %% after block 2


@celery_app.task(base=IdempotentTask, message_id="order:{name}", shared=False)
def charge(name, amount):
    pass


@celery_app.task(base=IdempotentTask, message_id="{name}", on_duplicate="raise", shared=False)
def strict(name):
    pass


def charged():
    return {row.key.message_id for row in celery_app.queue_log.store.rows(RowFilter())}


def orders():
    with site.app_context():
        return db.session.query(Order).count()


# %% after block 4
@site.post("/strict/<name>")
def place_strictly(name):
    strict.delay(name)
    return name


# %% after block 5
client = site.test_client()
assert [client.post("/orders/o-1/500").status_code for _ in range(2)] == [201, 200]
assert charged() == {"order:o-1"}
assert orders() == 1
assert not celery_app.queue_log.store.unsent(limit=9)
assert [client.post("/strict/s-1").status_code for _ in range(2)] == [200, 409]
assert client.post("/async-orders/o-2").status_code == 201
assert "order:o-2" in charged()
assert orders() == 2
with site.app_context():
    db.engine.dispose()
celery_app.queue_log.close()
celery_app.close()
