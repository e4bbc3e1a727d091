"""A transaction that the database has given up, and a commit that it answers by a rollback, without an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from celery_idempotent import IdempotentError, IdempotentTask, SQLStore
from celery_idempotent.core.records import ProcessedStatus
from celery_idempotent.core.store import TransactionStatus
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
        monkeypatch.setattr(
            type(dialect_named("postgresql")), "transaction_status", lambda *_: TransactionStatus.UNKNOWN
        )


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


def in_words(words: str) -> Callable[[IdempotentTask], object]:
    return lambda task: task.session.execute(sa.text(words))


def to_the_driver(words: str) -> Callable[[IdempotentTask], object]:
    return lambda task: task.connection.exec_driver_sql(words)


def on_the_drivers_cursor(words: str) -> Callable[[IdempotentTask], object]:
    def execute(task: IdempotentTask) -> None:
        cursor = task.connection.connection.cursor()
        cursor.execute(words)
        cursor.close()

    return execute


ENDS = {
    "rollback": in_words("rollback"),
    "commit": in_words("COMMIT"),
    "commit, after a comment": in_words("/* now */ -- so\n commit"),
    "to the driver": to_the_driver("ROLLBACK"),
    "on a cursor": on_the_drivers_cursor("ROLLBACK"),
}


@pytest.mark.parametrize("caught", [False, True], ids=["the error is raised", "it is caught"])
@pytest.mark.parametrize("end", ENDS)
def test_a_transaction_ended_by_a_statement_fails(eager_app: EagerApp, end: str, caught: bool) -> None:
    def body(self: IdempotentTask) -> str:
        self.session.add(Effect(name="before"))
        self.session.flush()
        try:
            ENDS[end](self)
            self.session.execute(sa.insert(Effect).values(name="after", value=0))
        except IdempotentError:
            if not caught:
                raise
        return "paid"

    done = eager_app.run(body)

    assert "ended its transaction itself" in str(done.result.result)
    assert done.row.processed_status is ProcessedStatus.FAILURE
    assert eager_app.effects.names() == []


@pytest.mark.parametrize("store_url", ["mariadb"], indirect=True)
def test_a_statement_that_commits_implicitly_fails(eager_app: EagerApp) -> None:
    def body(self: IdempotentTask) -> str:
        self.session.add(Effect(name="before"))
        self.session.flush()
        self.session.execute(sa.text("CREATE OR REPLACE TABLE of_the_body (id int)"))
        return "paid"

    done = eager_app.run(body)

    assert "commits by itself" in str(done.result.result)
    assert done.row.processed_status is ProcessedStatus.FAILURE
    assert eager_app.effects.names() == ["before"]  # the server has committed it: the message says so by its failure


def test_savepoints_in_words_leave_the_transaction_alone(eager_app: EagerApp) -> None:
    def body(self: IdempotentTask) -> str:
        self.session.add(Effect(name="before"))
        self.session.flush()
        for words in (
            "SAVEPOINT mine",
            "INSERT INTO effects (name, value) VALUES ('undone', 0)",
            "ROLLBACK TO SAVEPOINT mine",
        ):
            self.session.execute(sa.text(words))
        self.session.execute(sa.text("-- commit;\nINSERT INTO effects (name, value) VALUES ('after', 0)"))
        return "paid"

    done = eager_app.run(body)

    assert done.result.get() == "paid"
    assert eager_app.effects.names() == ["after", "before"]
