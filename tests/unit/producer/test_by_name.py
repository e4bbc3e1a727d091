"""What the signal before a publication does for messages that are not guarded: as little as there is to do."""

from __future__ import annotations

import pytest
from celery import Celery

from celery_idempotent import IdempotentTask
from celery_idempotent.queue_log import QueueLog


def test_a_plain_task_is_published_without_opening_the_store(caplog: pytest.LogCaptureFixture) -> None:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.idempotent_store = "nonsense://host/log"
    app.task(base=IdempotentTask, name="guarded", shared=False)(body)
    plain = app.task(name="plain", shared=False)(body)
    app.finalize()

    plain.delay()
    app.send_task("unknown")

    assert "store" not in vars(QueueLog.of(app))
    assert "ConfigurationError" not in caplog.text
    app.close()


def body() -> None: ...
