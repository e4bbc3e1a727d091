"""A transaction that the database has given up, and a commit that it answers by a rollback, without an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from celery_idempotent import IdempotentTask, SQLStore
from celery_idempotent.core.records import ProcessedStatus
from celery_idempotent.stores.sql.dialects import dialect_named
from tests.integration.worker.atomic.conftest import EagerApp
from tests.support.effects import Effect

on_postgresql = pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)


def by_the_session(session: Session) -> None:
    with pytest.raises(DBAPIError):
        session.execute(sa.text("SELECT no_such_column"))


def by_the_driver(session: Session) -> None:
    cursor = session.connection().connection.cursor()
    with pytest.raises(Exception, match="no_such_column"):
        cursor.execute("SELECT no_such_column")
    cursor.close()


@pytest.fixture(params=["the driver tells", "the row is read"])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By psycopg; and by a driver that does not tell how a transaction stands, as pg8000."""
    if request.param == "the row is read":
        monkeypatch.setattr(type(dialect_named("postgresql")), "gave_up", lambda *_: None)


@pytest.mark.usefixtures("told")
@on_postgresql
@pytest.mark.parametrize("fail", [by_the_session, by_the_driver])
def test_a_failing_statement_before_the_commit_is_no_success(
    open_eager_app: Callable[..., EagerApp], store_url: str, fail: Callable[[Session], None]
) -> None:
    """The app's session may do more when it commits: the completion is written by then."""
    factory = sessionmaker()
    failing = [fail]

    @sa.event.listens_for(factory, "before_commit")
    def audit(session: Session) -> None:
        failing[0](session)

    eager_app = open_eager_app(SQLStore(store_url), session_factory=factory)

    def body(self: IdempotentTask) -> str:
        self.session.add(Effect(name="paid"))
        return "paid"

    done = eager_app.run(body)

    assert "rolled it back" in str(done.result.result)
    assert done.row.processed_status is ProcessedStatus.FAILURE
    assert eager_app.effects.names() == []

    failing[0] = lambda _: None
    again = eager_app.run(body, message_id="again")
    assert again.result.get() == "paid"
    assert again.row.processed_status is ProcessedStatus.SUCCESS
    assert eager_app.effects.names() == ["paid"]


@pytest.mark.usefixtures("told")
@on_postgresql
def test_a_rolled_back_commit_leaves_no_recovery_point(open_eager_app: Callable[..., EagerApp], store_url: str) -> None:
    factory = sessionmaker()
    sa.event.listen(factory, "before_commit", by_the_session)
    eager_app = open_eager_app(SQLStore(store_url), session_factory=factory)
    called: list[Any] = []

    @eager_app.app.task(name="linked", shared=False)
    def linked(value: Any) -> None:
        called.append(value)

    def body(self: IdempotentTask) -> str:
        self.session.add(Effect(name="paid"))
        return "paid"

    task = eager_app.task(body)
    result = task.apply((), message_id="m", link=linked.s())

    assert result.state == "FAILURE"
    assert eager_app.row(task).processed_status is ProcessedStatus.FAILURE
    assert (eager_app.effects.names(), called) == ([], [])


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_transaction_that_sqlite_has_ended_is_no_success(eager_app: EagerApp) -> None:
    """As it does on a full disk, or with ON CONFLICT ROLLBACK; later statements would commit by themselves."""

    def body(self: IdempotentTask) -> str:
        self.session.add(Effect(name="paid"))
        self.session.flush()
        with pytest.raises(DBAPIError):
            self.session.execute(
                sa.text("INSERT OR ROLLBACK INTO effects (id, name, value) SELECT id, '', 0 FROM effects")
            )
        return "paid"

    done = eager_app.run(body)

    assert done.row.processed_status is ProcessedStatus.FAILURE
    assert eager_app.effects.names() == []
