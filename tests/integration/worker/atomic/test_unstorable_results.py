"""A result that the result backend cannot take: the row ends as Celery tells the caller, and the transaction agrees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from celery import Celery, states
from celery.app.trace import build_tracer

from celery_idempotent import IdempotentTask
from celery_idempotent.core.records import MessageKey, ProcessedStatus, Row, Status


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    app = Celery("unstorable", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idempotent_store=f"sqlite:///{tmp_path / 'log.db'}")
    yield app
    app.queue_log.close()
    app.close()


def deliver(app: Celery, task: IdempotentTask, **request: Any) -> tuple[Row, str]:
    """Run a delivery as a worker traces it; its row, and what the result backend says."""
    task_id = uuid4().hex  # the backend in memory is one for the whole process
    made = {"id": task_id, "task": task.name, "is_eager": False, "delivery_info": {}, "retries": 0, "headers": None}
    build_tracer(task.name, task, app=app)(task_id, (), {}, {**made, **request})
    row: Row | None = task.queue_log.store.find(MessageKey(task_id, task.name))
    assert row is not None
    return row, app.backend.get_state(task_id)


@pytest.mark.parametrize("options", [{}, {"keep_result": False}, {"ignore_result": True}], ids=str)
@pytest.mark.parametrize("atomic", [False, True], ids=["plain", "atomic"])
def test_the_row_and_the_effect_agree_with_the_caller(app: Celery, atomic: bool, options: dict[str, Any]) -> None:
    @app.task(base=IdempotentTask, bind=True, name="effect", shared=False, atomic=atomic, **options)
    def effect(self: IdempotentTask) -> object:
        if atomic:
            self.connection.execute(sa.text("INSERT INTO effects VALUES (1)"))
        return object()

    task: IdempotentTask = app.tasks["effect"]
    engine = task.queue_log.store.engine  # type: ignore[attr-defined]
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE effects (value INTEGER)"))

    row, state = deliver(app, task)

    with engine.connect() as connection:
        effects = connection.execute(sa.text("SELECT COUNT(*) FROM effects")).scalar_one()
    if "ignore_result" in options:
        assert (row.status, row.processed_status, state) == (Status.DONE, ProcessedStatus.SUCCESS, states.PENDING)
        assert effects == atomic
    else:
        assert (row.status, row.processed_status, state) == (Status.DONE, ProcessedStatus.FAILURE, states.FAILURE)
        assert str(row.error).startswith("kombu.exceptions.EncodeError: ")
        assert (effects, row.message is not None) == (0, True)


@pytest.mark.parametrize("waits", ["callbacks", "chain"])
def test_callbacks_are_not_sent_and_the_row_has_failed(app: Celery, waits: str) -> None:
    @app.task(base=IdempotentTask, name="first", shared=False)
    def first() -> object:
        return object()

    @app.task(base=IdempotentTask, name="second", shared=False)
    def second(_: Any) -> None: ...

    step = second.s() if waits == "callbacks" else second.s().set(task_id="next")

    row, state = deliver(app, first, **{waits: [dict(step)]})

    assert (row.status, row.processed_status, state) == (Status.DONE, ProcessedStatus.FAILURE, states.FAILURE)


def test_a_result_celery_can_store_is_a_success(app: Celery) -> None:
    """Celery stores an AsyncResult as a tuple; our serializers do not."""

    @app.task(base=IdempotentTask, name="another", shared=False)
    def another() -> object:
        return app.AsyncResult("of another task")

    row, state = deliver(app, another)

    assert (row.processed_status, row.result, state) == (ProcessedStatus.SUCCESS, None, states.SUCCESS)


def test_an_eager_result_may_be_unserializable(app: Celery) -> None:
    @app.task(base=IdempotentTask, name="eager", shared=False)
    def eager() -> object:
        return object()

    result = eager.apply(task_id="id")

    assert (result.state, type(result.result)) == (states.SUCCESS, object)
    row = app.queue_log.store.find(MessageKey("id", "eager"))
    assert row.processed_status is ProcessedStatus.SUCCESS
