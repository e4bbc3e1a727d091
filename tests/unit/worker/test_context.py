"""What code called by a task learns about its message."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_idempotent import CurrentMessage, IdempotentTask, current_message
from celery_idempotent.core.records import MessageKey
from celery_idempotent.worker.lease_renewal import LeaseRenewer
from tests.support.apps import close_app


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    app = Celery("current", set_as_current=False, broker="memory://", backend="cache+memory://")
    app.conf.idempotent_store = f"sqlite:///{tmp_path / 'store.db'}"
    yield app
    close_app(app)


def task(app: Celery, body: Any, **options: Any) -> Any:
    body.__name__ = "body"  # Celery cannot compile a lambda's
    options = {"base": IdempotentTask, "bind": True, "name": "shop.charge", "shared": False, **options}
    app.task(**options)(body)
    return app.tasks[options["name"]]


def told() -> CurrentMessage:
    message = current_message()
    assert message is not None
    return message


@pytest.mark.parametrize("atomic", [False, True])
def test_the_context_has_the_message(app: Celery, atomic: bool) -> None:
    before = datetime.now(UTC)
    message = task(app, lambda self: told(), atomic=atomic, lease=30, keep_result=False).apply(message_id="m").get()

    assert (message.message_id, message.task_name, message.attempt, message.token) == ("m", "shop.charge", 0, 1)
    assert message.deadline.tzinfo is UTC
    assert before + timedelta(seconds=29) < message.deadline < datetime.now(UTC) + timedelta(seconds=30)


def test_an_attempt_and_its_token(app: Celery) -> None:
    messages = []

    def body(self: IdempotentTask) -> None:
        messages.append(told())
        if not self.request.retries:
            raise self.retry(countdown=0)

    task(app, body).apply(message_id="m")

    assert [(message.attempt, message.token) for message in messages] == [(0, 1), (1, 2)]


def test_the_deadline_follows_the_renewals(app: Celery) -> None:
    def body(self: IdempotentTask) -> list[CurrentMessage]:
        first = last = told()
        end = time.monotonic() + 30
        while last.deadline == first.deadline or last.deadline - first.deadline < timedelta(seconds=0.1):  # type: ignore[operator]
            assert time.monotonic() < end
            time.sleep(0.01)
            last = told()
        row = self.queue_log.store.find(MessageKey("m", "shop.charge"))
        assert row is not None
        assert row.lease_expires_at is not None
        # SQLite's clock is ours, in whole milliseconds; one more renewal may have been under way.
        assert last.deadline is not None
        assert last.deadline <= row.lease_expires_at + timedelta(milliseconds=2)
        return [first, last]

    first, last = task(app, body, lease=0.6, keep_result=False).apply(message_id="m").get()

    assert last.deadline > first.deadline
    assert (first.message_id, first.token) == (last.message_id, last.token)


def test_a_claim_not_held_has_no_deadline(app: Celery) -> None:
    def body(self: IdempotentTask) -> CurrentMessage:
        LeaseRenewer.of(self.queue_log).let_go(self.request.idempotent_run.claim)
        return told()

    assert task(app, body, keep_result=False).apply(message_id="m").get().deadline is None


def test_a_task_called_as_a_function_sees_the_outer_message(app: Celery) -> None:
    inner = task(app, lambda self: told(), name="inner")

    message = task(app, lambda self: inner(), keep_result=False).apply(message_id="m").get()

    assert (message.message_id, message.task_name) == ("m", "shop.charge")


def test_outside_a_guarded_task_it_is_none(app: Celery) -> None:
    @app.task(name="plain", shared=False)
    def plain() -> CurrentMessage | None:
        return current_message()

    assert current_message() is None
    assert app.tasks["plain"].apply().get() is None
    assert task(app, lambda self: current_message())() is None


def test_while_the_guard_is_off_it_has_its_id(app: Celery) -> None:
    app.conf.idempotent_enabled = False
    charge = task(app, lambda self, order="o-1": current_message(), message_id="order:{order}", keep_result=False)
    message = charge.apply().get()
    assert (message.message_id, message.task_name, message.attempt) == ("order:o-1", "shop.charge", 0)
    assert (message.token, message.deadline) == (None, None)


def test_while_the_guard_is_off_a_message_without_an_id_runs(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    app.conf.idempotent_enabled = False
    charge = task(app, lambda self, order=None: current_message(), message_id="order:{order}", keep_result=False)
    result = charge.apply()
    assert result.get().message_id == result.id
    assert "runs without a message id" in caplog.text
