"""``with outbox(session)``: what is sent inside is published if, and when, the session's transaction commits."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_idempotent import DuplicateMessageError, MessageMismatchError, outbox
from celery_idempotent.core.records import Status
from tests.integration.producer.outbox.conftest import OutboxApp
from tests.support.effects import Effect


def test_a_commit_publishes_at_once(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]
    with outbox_app.session() as session, outbox(session):
        session.add(Effect(name="o-1"))
        result = charge.delay("o-1", 500)
        assert outbox_app.published() == []
        assert outbox_app.row("charge", "o-1") is None, "others do not see it yet"
        session.commit()
        assert outbox_app.published() == ["o-1"]

    row = outbox_app.there("charge", "o-1")
    assert (row.task_id, row.status, result.duplicate) == (result.id, Status.PENDING, False)
    assert row.published_at is not None
    assert row.lease_expires_at is None
    assert outbox_app.effects.names() == ["o-1"]
    assert outbox_app.store.unsent(limit=9) == []


@pytest.mark.parametrize("end", ["rollback", "close", "error"])
def test_a_rollback_publishes_nothing(outbox_app: OutboxApp, end: str) -> None:
    charge = outbox_app.app.tasks["charge"]
    expected = pytest.raises(ZeroDivisionError) if end == "error" else nullcontext()
    with expected, outbox_app.session() as session, outbox(session):
        session.add(Effect(name="o-1"))
        charge.delay("o-1", 500)
        if end == "error":
            raise ZeroDivisionError
        getattr(session, end)()

    assert outbox_app.published() == []
    assert outbox_app.row("charge", "o-1") is None
    assert outbox_app.effects.names() == []
    assert charge.delay("o-1", 900).duplicate is False


def test_the_commit_may_come_after_the_block(outbox_app: OutboxApp) -> None:
    with outbox_app.session() as session:
        with outbox(session):
            outbox_app.app.tasks["charge"].delay("o-1")
        assert outbox_app.published() == []
        session.commit()
        assert outbox_app.published() == ["o-1"]
        session.commit()
        outbox_app.app.tasks["charge"].delay("o-2")
        assert outbox_app.published() == ["o-2"], "outside of the block a call is sent at once"


def test_each_commit_publishes_what_came_before_it(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]
    with outbox_app.session() as session, outbox(session):
        charge.delay("o-1")
        session.commit()
        charge.delay("o-2")
        session.rollback()
        charge.delay("o-3")
        charge.delay("o-4")
        session.commit()
    assert outbox_app.published() == ["o-1", "o-3", "o-4"]


def test_begin_commits_at_its_end(outbox_app: OutboxApp) -> None:
    with sessionmaker(outbox_app.effects.engine).begin() as session, outbox(session):
        outbox_app.app.tasks["charge"].delay("o-1")
    assert outbox_app.published() == ["o-1"]


def test_a_savepoint_that_is_rolled_back_takes_its_calls_along(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]
    with outbox_app.session() as session, outbox(session):
        session.add(Effect(name="kept"))
        charge.delay("kept")
        with session.begin_nested():
            charge.delay("released")
            with pytest.raises(ZeroDivisionError), session.begin_nested():  # noqa: PT012
                session.add(Effect(name="undone"))
                session.flush()
                charge.delay("undone")
                raise ZeroDivisionError
        outer = session.begin_nested()
        with session.begin_nested():
            charge.delay("released into what is undone")
        outer.rollback()
        charge.delay("last")
        session.commit()

    assert outbox_app.published() == ["kept", "released", "last"]
    assert outbox_app.effects.names() == ["kept"]
    assert outbox_app.row("charge", "undone") is None


def test_a_session_inside_of_somebodys_transaction_publishes_nothing(outbox_app: OutboxApp) -> None:
    """As in a test suite that rolls everything back: the commit is unknown, so the relay looks."""
    with outbox_app.effects.engine.connect() as connection:
        for mode in ("rollback_only", "create_savepoint"):
            connection.begin()
            # Not every option of a session is in its stubs.
            joined: dict[str, Any] = {"bind": connection, "join_transaction_mode": mode}
            with Session(**joined) as session, outbox(session):
                outbox_app.app.tasks["charge"].delay(mode)
                session.commit()
                assert outbox_app.published() == []
            (connection.rollback if mode == "rollback_only" else connection.commit)()
    assert outbox_app.row("charge", "rollback_only") is None
    assert [row.key.message_id for row in outbox_app.store.unsent(limit=9)] == ["create_savepoint"]


# -- duplicates -------------------------------------------------------------------------------------------------------------


def test_a_duplicate_is_seen_at_the_call_and_counted_by_the_commit(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]
    first = charge.delay("o-1")
    outbox_app.messages()
    for end, counted in (("rollback", 0), ("commit", 1)):
        with outbox_app.session() as session, outbox(session):
            again = charge.delay("o-1")
            assert (again.id, again.duplicate) == (first.id, True)
            getattr(session, end)()
        assert outbox_app.there("charge", "o-1").duplicates == counted
    assert outbox_app.published() == []


def test_of_two_calls_in_one_transaction_one_is_sent(outbox_app: OutboxApp) -> None:
    with outbox_app.session() as session, outbox(session):
        results = [outbox_app.app.tasks["charge"].delay("o-1") for _ in range(2)]
        session.commit()
    assert [result.duplicate for result in results] == [False, True]
    assert outbox_app.published() == ["o-1"]


@pytest.mark.parametrize(
    ("task", "amount", "error"), [("strict", 1, DuplicateMessageError), ("charge", 2, MessageMismatchError)]
)
def test_a_refused_call_raises_and_leaves_the_transaction_intact(
    outbox_app: OutboxApp, task: str, amount: int, error: type[Exception]
) -> None:
    outbox_app.app.tasks[task].delay("o-1", 1)
    outbox_app.messages()
    with outbox_app.session() as session, outbox(session):
        session.add(Effect(name="kept"))
        with pytest.raises(error):
            outbox_app.app.tasks[task].delay("o-1", amount)
        outbox_app.app.tasks[task].delay("o-2", 1)
        session.commit()
    assert outbox_app.published() == ["o-2"]
    assert outbox_app.effects.names() == ["kept"]


@pytest.mark.parametrize("store_url", ["mariadb"], indirect=True)
@pytest.mark.parametrize("batch", [False, True])
def test_a_duplicate_may_be_newer_than_the_snapshot(outbox_app: OutboxApp, batch: bool) -> None:
    """At the default level a transaction reads what was there when it first read; an insert meets what is there."""
    charge = outbox_app.app.tasks["charge"]
    with outbox_app.session() as session, outbox(session):
        session.scalars(select(Effect.id)).all()
        with outbox_app.session() as other, outbox(other):
            firsts = [charge.delay(f"o-{number}") for number in range(2)]
            other.commit()
        with outbox() if batch else nullcontext():
            again = [charge.delay(f"o-{number}") for number in range(2)]
        session.add(Effect(name="kept"))
        session.commit()
    assert [(result.id, result.duplicate) for result in again] == [(first.id, True) for first in firsts]
    assert outbox_app.published() == ["o-0", "o-1"]
    assert outbox_app.effects.names() == ["kept"]


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_the_row_of_a_duplicate_is_not_locked_until_the_commit(outbox_app: OutboxApp) -> None:
    """Its consumer has to write it meanwhile. SQLite locks everything, MariaDB any row that an insert has met."""
    charge = outbox_app.app.tasks["charge"]
    charge.delay("o-1")
    with outbox_app.session() as session, outbox(session):
        assert charge.delay("o-1").duplicate
        outbox_app.store.count_duplicate(outbox_app.there("charge", "o-1").key)
        assert outbox_app.there("charge", "o-1").duplicates == 1
        session.commit()
    assert outbox_app.there("charge", "o-1").duplicates == 2


def test_an_id_that_is_free_again_is_taken(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]
    key = outbox_app.there("charge", charge.delay("o-1").id and "o-1").key
    outbox_app.store.cancel(key, task_id=outbox_app.there("charge", "o-1").task_id, error="revoked", unique_for=0.0)
    outbox_app.messages()
    with outbox_app.session() as session, outbox(session):
        assert charge.delay("o-1", 7).duplicate is False
        session.commit()
    assert outbox_app.published() == ["o-1"]


def test_a_failed_message_may_be_sent_again(outbox_app: OutboxApp) -> None:
    def again(order: str) -> str:
        return order

    task = outbox_app.task(again, message_id="{order}", resubmit_failed=True)
    first = task.delay("o-1")
    outbox_app.store.cancel(outbox_app.there("again", "o-1").key, task_id=first.id, error="revoked")
    outbox_app.messages()
    with outbox_app.session() as session, outbox(session):
        second = task.delay("o-1")
        session.commit()
    row = outbox_app.there("again", "o-1")
    assert (row.status, row.task_id, row.lease_expires_at) == (Status.PENDING, second.id, None)
    assert row.published_at is not None
    assert outbox_app.published() == ["o-1"]


# -- what is published ------------------------------------------------------------------------------------------------------


def test_a_countdown_begins_when_the_call_is_recorded(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]
    before = datetime.now(UTC)
    with outbox_app.session() as session, outbox(session):
        charge.apply_async(("o-1",), countdown=3600)
        charge.apply_async(("o-2",), eta=before + timedelta(hours=2), expires=7200)
        session.commit()
    first, second = outbox_app.messages()
    etas = [datetime.fromisoformat(message.headers["eta"]) for message in (first, second)]
    assert abs((etas[0] - before).total_seconds() - 3600) < 30
    assert abs((etas[1] - before).total_seconds() - 7200) < 30
    due = outbox_app.there("charge", "o-1").available_at
    assert due is not None
    assert abs((due - before).total_seconds() - 3600) < 30
    expires = datetime.fromisoformat(second.headers["expires"])
    assert abs((expires - before).total_seconds() - 7200) < 30


def test_arguments_are_those_of_the_call_whatever_becomes_of_them(outbox_app: OutboxApp) -> None:
    lines = [1]
    with outbox_app.session() as session, outbox(session):
        outbox_app.app.tasks["charge"].delay("o-1", lines)
        lines.append(2)
        session.commit()
    (message,) = outbox_app.messages()
    assert message.decode()[0] == ["o-1", [1]]


def test_a_canvas_is_recorded_and_published_by_the_commit(outbox_app: OutboxApp) -> None:
    plain = outbox_app.app.tasks["plain"]
    with outbox_app.session() as session, outbox(session):
        plain.apply_async(("linked",), link=plain.si("link"))
        grouped = group([plain.si("g-1"), plain.si("g-2")], app=outbox_app.app).delay()
        chained = chain(plain.si("c-1"), plain.si("c-2"), app=outbox_app.app).delay()
        chord([plain.si("h-1"), plain.si("h-2")], plain.si("body"), app=outbox_app.app).delay()
        assert outbox_app.published() == []
        session.commit()

    messages = outbox_app.messages()
    assert [message.decode()[0][0] for message in messages] == ["linked", "g-1", "g-2", "c-1", "h-1", "h-2"]
    embedded = [message.decode()[2] for message in messages]
    assert embedded[0]["callbacks"]
    assert embedded[3]["chain"]
    assert embedded[4]["chord"]
    assert [message.properties["correlation_id"] for message in messages[1:3]] == [
        child.id for child in grouped.results
    ]
    assert messages[3].properties["correlation_id"] == chained.parent.id
    assert not outbox_app.store.unsent(limit=9)


def test_a_call_outside_the_outbox_is_published_at_once_and_logged(
    outbox_app: OutboxApp, caplog: pytest.LogCaptureFixture
) -> None:
    def body() -> None:
        """Do what a task of Celery's own class does."""

    foreign = outbox_app.app.task(body, name="foreign", shared=False)
    with caplog.at_level(logging.WARNING), outbox_app.session() as session, outbox(session):
        foreign.delay()
        outbox_app.app.send_task("charge", ("o-1",))
        assert len(outbox_app.messages()) == 2
        session.rollback()
    for name in ("foreign", "charge"):
        assert f"{name} is published at once although in an outbox" in caplog.text


def test_a_message_is_published_with_an_id_for_its_results(outbox_app: OutboxApp) -> None:
    with outbox_app.session() as session, outbox(session):
        result = outbox_app.app.tasks["plain"].apply_async(("x",), task_id="chosen", ignore_result=True)
        session.commit()
    (message,) = outbox_app.messages()
    assert (message.properties["correlation_id"], result.id, message.headers["ignore_result"]) == (
        "chosen",
        "chosen",
        True,
    )


# -- other sessions ---------------------------------------------------------------------------------------------------------


def test_a_registry_of_sessions_will_do(outbox_app: OutboxApp) -> None:
    """As Flask-SQLAlchemy's ``db.session`` is one."""
    registry = scoped_session(sessionmaker(outbox_app.effects.engine))
    with outbox(registry):
        outbox_app.app.tasks["charge"].delay("o-1")
        registry.commit()
    assert outbox_app.published() == ["o-1"]
    registry.remove()


def test_a_connection_will_do_if_the_block_is_around_its_transaction(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]
    with outbox_app.effects.engine.connect() as connection, outbox(connection):
        with connection.begin():
            charge.delay("o-1")
        with connection.begin():
            charge.delay("o-2")
            assert outbox_app.published() == ["o-1"]
        with pytest.raises(ZeroDivisionError), connection.begin():  # noqa: PT012
            charge.delay("undone")
            raise ZeroDivisionError
    assert outbox_app.published() == ["o-2"]
    assert outbox_app.row("charge", "undone") is None


def test_a_commit_after_the_block_is_left_to_the_relay(outbox_app: OutboxApp) -> None:
    with outbox_app.effects.engine.begin() as connection, outbox(connection):
        outbox_app.app.tasks["charge"].delay("o-1")
    assert outbox_app.published() == []
    assert [row.key.message_id for row in outbox_app.store.unsent(limit=9)] == ["o-1"]


@pytest.mark.parametrize("store_url", ["mariadb"], indirect=True)
def test_two_phases_are_a_commit_too(outbox_app: OutboxApp) -> None:
    """On PostgreSQL they have to be configured, SQLite has none."""
    with outbox_app.session(twophase=True) as session, outbox(session):
        outbox_app.app.tasks["charge"].delay("o-1")
        session.commit()
    assert outbox_app.published() == ["o-1"]


# -- transactions that the database has given up -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["session", "connection"])
def test_a_commit_that_the_database_answers_by_a_rollback_publishes_nothing(outbox_app: OutboxApp, how: str) -> None:
    """As PostgreSQL does, without an error, when one was caught before."""
    engine = outbox_app.effects.engine
    with Session(engine) if how == "session" else engine.connect() as owner, outbox(owner):
        owner.execute(insert(Effect).values(name="o-1", value=0))
        outbox_app.app.tasks["charge"].delay("o-1")
        with pytest.raises(DBAPIError):
            owner.execute(text("SELECT no_such_column"))
        owner.commit()

    kept = [] if engine.dialect.name == "postgresql" else ["o-1"]
    assert outbox_app.effects.names() == kept
    assert outbox_app.published() == kept
    assert outbox_app.store.unsent(limit=9) == []


@pytest.mark.parametrize("how", ["session", "connection"])
def test_an_error_that_only_the_driver_knows_of_publishes_nothing(outbox_app: OutboxApp, how: str) -> None:
    """As that of a COPY, or of anything on a cursor of the driver's own."""
    engine = outbox_app.effects.engine
    with Session(engine) if how == "session" else engine.connect() as owner, outbox(owner):
        owner.execute(insert(Effect).values(name="o-1", value=0))
        outbox_app.app.tasks["charge"].delay("o-1")
        connection = owner if isinstance(owner, Connection) else owner.connection()
        cursor = connection.connection.cursor()
        with pytest.raises(Exception, match=r"no[ _]such|[Uu]nknown"):
            cursor.execute("SELECT no_such_column")
        cursor.close()
        owner.commit()

    kept = [] if engine.dialect.name == "postgresql" else ["o-1"]
    assert outbox_app.effects.names() == kept
    assert outbox_app.published() == kept
    assert outbox_app.store.unsent(limit=9) == []


def test_a_savepoint_in_words_takes_its_calls_along(outbox_app: OutboxApp) -> None:
    charge = outbox_app.app.tasks["charge"]
    with outbox_app.session() as session, outbox(session):
        charge.delay("kept")
        session.execute(text("SAVEPOINT mine"))
        charge.delay("undone")
        charge.delay("again")
        session.execute(text("ROLLBACK TO SAVEPOINT mine"))
        second = charge.delay("again")
        session.commit()
    assert outbox_app.published() == ["kept", "again"]
    assert outbox_app.there("charge", "again").task_id == second.id
    assert outbox_app.row("charge", "undone") is None


@pytest.mark.parametrize("store_url", ["mariadb"], indirect=True)
def test_a_call_lost_to_a_deadlock_is_not_published(outbox_app: OutboxApp) -> None:
    """The server ends the transaction, and the next statement begins another one, which commits."""
    charge = outbox_app.app.tasks["charge"]
    with outbox_app.session() as session, outbox(session):
        charge.delay("before")
        # A deadlock does so, by its own choice of whom; this has no choice.
        session.connection().connection.dbapi_connection.rollback()  # type: ignore[union-attr]
        charge.delay("after")
        session.commit()
    assert outbox_app.published() == ["after"]
    assert outbox_app.row("charge", "before") is None


def test_a_commit_after_an_error_in_a_savepoint_publishes(outbox_app: OutboxApp) -> None:
    with outbox_app.session() as session, outbox(session):
        outbox_app.app.tasks["charge"].delay("o-1")
        with pytest.raises(DBAPIError), session.begin_nested():
            session.execute(text("SELECT no_such_column"))
        session.commit()
        outbox_app.app.tasks["charge"].delay("o-2")
        session.commit()
    assert outbox_app.published() == ["o-1", "o-2"]


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_sqlites_table_may_be_made_by_the_transaction_itself(outbox_app: OutboxApp, end: str) -> None:
    """Which has written already, so that no other connection could."""
    with outbox_app.effects.engine.begin() as connection:
        connection.execute(text("DROP TABLE queue_log"))
    outbox_app.app.queue_log.close()
    with outbox_app.session() as session, outbox(session):
        session.add(Effect(name="o-1"))
        session.flush()
        outbox_app.app.tasks["charge"].delay("o-1")
        getattr(session, end)()
    assert outbox_app.published() == (["o-1"] if end == "commit" else [])
    assert outbox_app.app.tasks["charge"].delay("o-1").duplicate is (end == "commit")
