"""What the tests of atomic tasks share: an app whose bodies run here, and the table of their effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery

from celery_idempotent import IdempotentTask, QueueLog, SQLStore
from celery_idempotent.core.records import MessageKey, Row
from tests.support.apps import close_app
from tests.support.effects import Effects

MESSAGE_ID = "m"


@dataclass
class EagerApp:
    """An app in this process, on the store of the test; messages are run by ``apply()``, as a worker would."""

    app: Celery
    effects: Effects

    @property
    def store(self) -> SQLStore:
        store: SQLStore = self.app.queue_log.store
        return store

    def task(self, body: Callable[..., Any], **options: Any) -> IdempotentTask:
        """Return a body as an atomic task; it is given the task."""
        body.__name__ = body.__name__.replace("<lambda>", "body")  # which Celery could not compile
        name = f"{body.__name__}-{len(self.app.tasks)}"
        options = {"base": IdempotentTask, "bind": True, "atomic": True, "name": name, "shared": False, **options}
        task: IdempotentTask = self.app.task(**options)(body)
        return self.app.tasks[name] if task.name == name else task

    def run(self, body: Callable[..., Any], *args: Any, message_id: str = MESSAGE_ID, **options: Any) -> Outcome:
        """Run a message of that task, and see what it leaves."""
        task = self.task(body, **options)
        result = task.apply(args, message_id=message_id)
        return Outcome(task, result, self.row(task, message_id))

    def row(self, task: IdempotentTask, message_id: str = MESSAGE_ID) -> Row:
        row = self.store.find(MessageKey(message_id, task.name))
        assert row is not None
        return row


@dataclass
class Outcome:
    task: IdempotentTask
    result: Any
    row: Row


@pytest.fixture
def effects(store_url: str) -> Iterator[Effects]:
    effects = Effects(store_url)
    yield effects
    effects.close()


@pytest.fixture
def open_eager_app(effects: Effects) -> Iterator[Callable[..., EagerApp]]:
    """Make an app on a store; its queue log's table is made. Keyword arguments are those of ``QueueLog``."""
    apps: list[Celery] = []

    def open_eager_app(store: SQLStore, **options: Any) -> EagerApp:
        app = Celery("here", set_as_current=False, broker="memory://", backend="cache+memory://")
        app.conf.task_always_eager = True
        QueueLog(app, store=store, **options).init()
        apps.append(app)
        app.finalize()
        return EagerApp(app, effects)

    yield open_eager_app
    for app in apps:
        close_app(app)


@pytest.fixture
def eager_app(open_eager_app: Callable[..., EagerApp], store_url: str) -> EagerApp:
    return open_eager_app(SQLStore(store_url))


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """Yield what any engine of this process executes; commits and rollbacks among it."""
    executed: list[str] = []

    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        executed.append(statement)

    def commit(connection: object) -> None:
        executed.append("COMMIT")

    def rollback(connection: object) -> None:
        executed.append("ROLLBACK")

    listeners = (("before_cursor_execute", note), ("commit", commit), ("rollback", rollback))
    for name, listener in listeners:
        sa.event.listen(sa.Engine, name, listener)
    yield executed
    for name, listener in listeners:
        sa.event.remove(sa.Engine, name, listener)
