"""What an atomic body sends is recorded in its transaction, and published after its commit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import group
from celery.exceptions import Reject

from celery_idempotent import IdempotentTask, SQLStore, outbox
from celery_idempotent.core.records import MessageKey, ProcessedStatus, Status
from tests.integration.worker.atomic.conftest import EagerApp
from tests.support.apps import close_app
from tests.support.effects import Effect, add_to


@pytest.fixture
def ran() -> list[str]:
    """Return what the child was given, run by run."""
    return []


@pytest.fixture
def child(eager_app: EagerApp, ran: list[str]) -> IdempotentTask:
    """Return a guarded task, run where it is published, since the app is eager."""

    def body(name: str) -> str:
        ran.append(name)
        return name

    body.__name__ = "child"
    task: IdempotentTask = eager_app.app.task(base=IdempotentTask, name="child", shared=False)(body)
    return task


def test_it_is_published_after_the_commit(eager_app: EagerApp, child: IdempotentTask, ran: list[str]) -> None:
    seen: list[Any] = []

    def body(task: IdempotentTask) -> str:
        task.session.add(Effect(name="paid"))
        task.session.flush()
        result = child.delay("told")
        seen.extend([list(ran), eager_app.effects.names(), eager_app.store.find(MessageKey(result.id, "child"))])
        return str(result.id)

    outcome = eager_app.run(body)

    assert seen == [[], [], None], "nobody sees it before"
    assert ran == ["told"]
    assert eager_app.effects.names() == ["paid"]
    row = eager_app.store.find(MessageKey(outcome.result.get(), "child"))
    assert row is not None
    assert (row.status, row.processed_status) == (Status.DONE, ProcessedStatus.SUCCESS)
    assert eager_app.store.unsent(limit=9) == []


def test_a_body_that_only_sends_has_a_transaction_too(
    eager_app: EagerApp, child: IdempotentTask, ran: list[str]
) -> None:
    def body(task: IdempotentTask) -> None:
        child.delay("told")
        assert ran == []

    eager_app.run(body)
    assert ran == ["told"]


@pytest.mark.parametrize("end", ["error", "reject", "caught"])
def test_a_body_that_fails_has_sent_nothing(
    eager_app: EagerApp, child: IdempotentTask, ran: list[str], end: str
) -> None:
    def body(task: IdempotentTask) -> None:
        task.session.add(Effect(name="paid"))
        child.delay("told")
        if end == "caught":
            task.session.rollback()
        else:
            raise ValueError("no") if end == "error" else Reject("no", requeue=False)

    outcome = eager_app.run(body)

    assert outcome.row.processed_status is ProcessedStatus.FAILURE
    assert ran == []
    assert eager_app.effects.names() == []
    assert eager_app.store.unsent(limit=9) == []


def test_a_call_undone_by_a_savepoint_is_not_sent(eager_app: EagerApp, child: IdempotentTask, ran: list[str]) -> None:
    def body(task: IdempotentTask) -> None:
        child.delay("kept")
        nested = task.session.begin_nested()
        child.delay("undone")
        nested.rollback()

    eager_app.run(body)
    assert ran == ["kept"]


def test_a_body_that_is_run_again_sends_once(eager_app: EagerApp, child: IdempotentTask, ran: list[str]) -> None:
    """After a deadlock, say."""
    eager_app.effects.put("count")
    runs: list[str] = []

    def body(task: IdempotentTask) -> str:
        result = child.delay("told")
        runs.append(result.id)
        task.connection.execute(add_to("count"))
        if len(runs) == 1:
            unit: Any = task.request.idempotent_run.unit
            unit.watch.gave_way = ValueError("another one had to go first")
            raise unit.watch.gave_way
        return str(result.id)

    outcome = eager_app.run(body)

    assert outcome.result.get() == runs[1] == runs[0], "the same call in the same place"
    assert ran == ["told"]
    assert eager_app.effects.value("count") == 1


def test_a_body_whose_claim_was_lost_has_sent_nothing(
    eager_app: EagerApp, child: IdempotentTask, ran: list[str]
) -> None:
    def body(task: IdempotentTask) -> None:
        child.delay("told")
        row = eager_app.row(task)
        if eager_app.store.engine.dialect.name != "sqlite":  # where no one else can write now
            eager_app.store.expire(task.request.idempotent_run.claim)
            assert (
                eager_app.store.take_over(eager_app.row(task), task_id="x", worker="w", lease=60.0, attempt=0)
                is not None
            )
        else:
            run: Any = task.request.idempotent_run
            run.claim = type(run.claim)(row.key, row.token + 1)

    task = eager_app.task(body)
    task.apply((), message_id="m")
    assert ran == []
    assert eager_app.store.unsent(limit=9) == []


def test_a_retry_has_sent_nothing(eager_app: EagerApp, child: IdempotentTask, ran: list[str]) -> None:
    def body(task: IdempotentTask) -> None:
        child.delay(f"attempt {task.request.retries}")
        if task.request.retries < 1:
            raise task.retry(countdown=0)

    eager_app.run(body, max_retries=3)
    assert ran == ["attempt 1"]


def test_a_canvas_is_sent_with_it(eager_app: EagerApp, child: IdempotentTask, ran: list[str]) -> None:
    def body(task: IdempotentTask) -> None:
        group([child.si("g-1"), child.si("g-2")], app=eager_app.app).delay()
        assert ran == []

    eager_app.run(body)
    assert sorted(ran) == ["g-1", "g-2"]


def test_a_batch_in_a_body_joins_it(eager_app: EagerApp, child: IdempotentTask, ran: list[str]) -> None:
    def body(task: IdempotentTask, fails: bool) -> None:
        with outbox():
            results = [child.delay(f"b-{number}") for number in range(3)]
        assert [result.duplicate for result in results] == [False] * 3
        assert ran == []
        if fails:
            raise ValueError("no")

    task = eager_app.task(body)
    task.apply((True,), message_id="first")
    assert ran == []
    task.apply((False,), message_id="second")
    assert ran == ["b-0", "b-1", "b-2"]


@pytest.mark.parametrize("what", ["session", "connection"])
def test_an_outbox_of_the_bodys_own_session_is_the_bodys(
    eager_app: EagerApp, child: IdempotentTask, ran: list[str], what: str
) -> None:
    def body(task: IdempotentTask) -> None:
        with outbox(getattr(task, what)):
            child.delay("told")
        assert ran == []

    eager_app.run(body)
    assert ran == ["told"]


def test_an_outbox_of_another_session_is_another_transaction(
    open_eager_app: Callable[..., EagerApp], eager_app: EagerApp, child: IdempotentTask, ran: list[str]
) -> None:
    from sqlalchemy.orm import Session

    def body(task: IdempotentTask) -> None:
        with Session(eager_app.effects.engine) as session, outbox(session):
            child.delay("told")
            session.commit()
        assert ran == ["told"]
        raise ValueError("no")

    eager_app.run(body)
    assert ran == ["told"]


def test_an_eager_run_inside_of_a_body_stands_for_itself(
    eager_app: EagerApp, child: IdempotentTask, ran: list[str]
) -> None:
    """It is done when it returns, and so are its messages, even if the outer body fails."""

    def inner(task: IdempotentTask) -> None:
        child.delay("of the inner one")

    plain = eager_app.task(inner, atomic=False)

    def body(task: IdempotentTask) -> None:
        plain.apply((), message_id="inner").get(disable_sync_subtasks=False)
        assert ran == ["of the inner one"]
        raise ValueError("no")

    eager_app.run(body)
    assert ran == ["of the inner one"]


def test_calls_of_another_app_are_not_part_of_the_transaction(
    eager_app: EagerApp, store_url: str, open_eager_app: Callable[..., EagerApp]
) -> None:
    other = open_eager_app(SQLStore(store_url))
    sent: list[str] = []

    def foreign(name: str) -> None:
        sent.append(name)

    theirs = other.app.task(base=IdempotentTask, name="foreign", shared=False)(foreign)

    def body(task: IdempotentTask) -> None:
        theirs.delay("at once")
        assert sent == ["at once"]

    eager_app.run(body)
    close_app(other.app)
