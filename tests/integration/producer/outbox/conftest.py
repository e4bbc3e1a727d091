"""What the tests of the outbox share: an app whose messages go no further than a broker in this process, and a user's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from kombu.exceptions import OperationalError
from kombu.message import Message
from sqlalchemy.orm import Session

from celery_idempotent import IdempotentTask, QueueLog, SQLStore
from celery_idempotent.core.records import MessageKey, Row
from tests.support.apps import close_app
from tests.support.effects import Effects


@dataclass
class OutboxApp:
    """An app, the store's database as its user knows it, and what the broker has got."""

    app: Celery
    effects: Effects
    queue: str

    @property
    def store(self) -> SQLStore:
        store: SQLStore = self.app.queue_log.store
        return store

    def task(self, body: Callable[..., Any], **options: Any) -> IdempotentTask:
        options = {"base": IdempotentTask, "name": body.__name__, "shared": False, **options}
        task: IdempotentTask = self.app.task(**options)(body)
        return task

    @contextmanager
    def session(self, **options: Any) -> Iterator[Session]:
        """Yield a session of the user's, on an engine of the user's."""
        with Session(self.effects.engine, **options) as session:
            yield session

    def row(self, task: str, message_id: str) -> Row | None:
        return self.store.find(MessageKey(message_id, task))

    def there(self, task: str, message_id: str) -> Row:
        row = self.row(task, message_id)
        assert row is not None
        return row

    def messages(self) -> list[Message]:
        """Return what the broker has got since the last look."""
        taken: list[Message] = []
        with self.app.connection_for_read() as connection:
            queue = self.app.amqp.queues[self.queue](connection.default_channel)
            queue.declare()
            while (message := queue.get(no_ack=True)) is not None:
                taken.append(message)
        return taken

    def published(self) -> list[str]:
        """Return the message ids of that."""
        return [message.properties["message_id"] for message in self.messages()]

    @contextmanager
    def broken_broker(self) -> Iterator[list[str]]:
        """Have the broker take nothing; yield what it was offered."""
        offered: list[str] = []

        def refuse(*_: Any, message_id: str, **__: Any) -> Any:
            offered.append(message_id)
            raise OperationalError("it takes nothing")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(IdempotentTask, "publish", refuse)
            yield offered


@pytest.fixture
def effects(store_url: str) -> Iterator[Effects]:
    effects = Effects(store_url)
    yield effects
    effects.close()


@pytest.fixture
def outbox_app(store_url: str, effects: Effects) -> Iterator[OutboxApp]:
    queue = f"outbox-{uuid4().hex[:8]}"
    app = Celery("outbox_app", set_as_current=False, broker="memory://", backend="cache+memory://")
    app.conf.update(task_default_queue=queue, idempotent_lease=60.0)
    QueueLog(app, store=SQLStore(store_url)).init()
    outbox_app = OutboxApp(app, effects, queue)

    def charge(order: str, amount: Any = 0) -> str:
        return order

    outbox_app.task(charge, message_id="{order}")
    outbox_app.task(charge, name="strict", message_id="{order}", on_duplicate="raise")
    outbox_app.task(charge, name="plain")
    app.finalize()
    yield outbox_app
    close_app(app)
