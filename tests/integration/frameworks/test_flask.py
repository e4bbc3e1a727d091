"""Flask-SQLAlchemy: ``outbox(db.session)``, with the session as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask import Flask
from flask.testing import FlaskClient
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from celery_idempotent import QueueLog, SQLStore, outbox
from tests.integration.frameworks.conftest import OutboxApp


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)


class Order(db.Model):  # type: ignore[name-defined, misc] # a class that is made at run time
    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


@pytest.fixture
def site(store_url: str, outbox_app: OutboxApp) -> Iterator[Flask]:
    """Yield a site whose database is the queue log's."""
    charge = outbox_app.app.tasks["charge"]
    site = Flask(__name__)
    site.config["SQLALCHEMY_DATABASE_URI"] = store_url
    db.init_app(site)

    @site.post("/orders/<int:amount>")
    def place(amount: int) -> str:
        with outbox(db.session):
            order = Order(amount=amount)
            db.session.add(order)
            db.session.flush()
            charge.delay(str(order.id), amount)
            assert outbox_app.messages() == []
            if amount == 0:
                raise ValueError("no such amount")
            db.session.commit()
        return str(order.id)

    @site.post("/forgotten/<int:amount>")
    def forget(amount: int) -> str:
        with outbox(db.session):
            db.session.add(Order(amount=amount))
            charge.delay("forgotten", amount)
        return "the commit is missing"

    @site.post("/two-steps/<int:amount>")
    def commit_later(amount: int) -> str:
        with outbox(db.session):
            charge.delay("two-steps", amount)
        db.session.add(Order(amount=amount))
        db.session.commit()
        return "committed behind the block"

    @site.post("/async/<int:amount>")
    async def place_in_async_view(amount: int) -> str:
        with outbox(db.session):
            db.session.add(Order(amount=amount))
            result = await charge.adelay("async", amount)
            assert outbox_app.messages() == []
            if amount == 0:
                raise ValueError("no such amount")
            db.session.commit()
        return str(result.duplicate)

    with site.app_context():
        db.create_all()
    yield site
    with site.app_context():
        db.session.remove()
        db.drop_all()
        db.engine.dispose()


@pytest.fixture
def client(site: Flask) -> FlaskClient:
    return site.test_client()


def amounts(site: Flask) -> list[int]:
    with site.app_context():
        return list(db.session.scalars(select(Order.amount).order_by(Order.id)))


def test_a_view_that_commits_publishes_and_so_does_the_next_one(
    site: Flask, client: FlaskClient, outbox_app: OutboxApp
) -> None:
    for amount in (500, 700):
        order = client.post(f"/orders/{amount}").text
        assert outbox_app.published() == [order]
        row = outbox_app.there("charge", order)
        assert row.published_at is not None
    assert amounts(site) == [500, 700]
    assert outbox_app.store.unsent(limit=9) == []


def test_a_view_that_fails_leaves_neither_order_nor_message(
    site: Flask, client: FlaskClient, outbox_app: OutboxApp
) -> None:
    assert client.post("/orders/0").status_code == 500
    assert amounts(site) == []
    order = client.post("/orders/500").text
    assert outbox_app.published() == [order], "and nothing of the request before"
    assert amounts(site) == [500]


def test_an_uncommitted_request_publishes_nothing(site: Flask, client: FlaskClient, outbox_app: OutboxApp) -> None:
    client.post("/forgotten/500")
    assert (amounts(site), outbox_app.published(), outbox_app.row("charge", "forgotten")) == ([], [], None)
    client.post("/orders/700")
    assert len(outbox_app.published()) == 1


def test_the_commit_may_come_later_in_the_request(client: FlaskClient, outbox_app: OutboxApp) -> None:
    client.post("/two-steps/500")
    assert outbox_app.published() == ["two-steps"]


def test_the_store_may_be_on_the_sites_own_engine(site: Flask, client: FlaskClient, outbox_app: OutboxApp) -> None:
    outbox_app.app.queue_log.close()
    with site.app_context():
        QueueLog(outbox_app.app, store=SQLStore(db.engine))
    order = client.post("/orders/500").text
    assert outbox_app.published() == [order]
    assert client.post("/orders/0").status_code == 500
    assert (amounts(site), outbox_app.published()) == ([500], [])


def test_an_async_view_calls_in_the_sites_session(site: Flask, client: FlaskClient, outbox_app: OutboxApp) -> None:
    assert client.post("/async/0").status_code == 500
    assert (amounts(site), outbox_app.published(), outbox_app.row("charge", "async")) == ([], [], None)
    assert client.post("/async/500").text == "False"
    assert outbox_app.published() == ["async"]
    assert client.post("/async/500").text == "True"
    assert (amounts(site), outbox_app.published()) == ([500, 500], [])
