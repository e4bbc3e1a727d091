"""The result backend is away while a duplicate arrives: it waits, and is answered later."""

from __future__ import annotations

from dataclasses import replace

import pytest
from celery.result import AsyncResult

from celery_idempotent.core.records import MessageKey, Row, Status
from celery_idempotent.message.header import Header
from tests.support.apps import AppSpec, OpenApp
from tests.support.ledger import Ledger
from tests.support.servers import PrivateRedis
from tests.support.waiting import wait_until
from tests.support.worker import StartWorker

TIMEOUT = 90.0


@pytest.mark.parametrize("broker", ["redis"], indirect=True)
@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
@pytest.mark.timeout(240)
def test_a_duplicate_waits_for_the_result_backend(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger
) -> None:
    with PrivateRedis() as backend:
        settings = {"result_backend_transport_options": {"retry_policy": {"max_retries": 1}}}
        spec = replace(spec, backend=backend.url, settings=settings)
        app = open_app(spec)
        worker = start_worker(spec)
        echo = app.tasks["echo"]
        first = echo.apply_async(("value",), message_id="m")
        assert first.get(timeout=TIMEOUT) == "value"

        def row() -> Row:
            found: Row | None = app.queue_log.store.find(MessageKey("m", "echo"))
            assert found is not None
            return found

        wait_until(lambda: row().status is Status.DONE, timeout=TIMEOUT, describe="the first run's end")
        backend.stop()
        echo.publish(
            ("value",),
            {},
            task_id="copy",
            message_id="m",
            headers={**Header("m", "echo", "copy").write({}), "ignore_result": False},
            ignore_result=True,
        )
        worker.wait_for_log("the result backend gives no answer", timeout=TIMEOUT)
        backend.start()

        def answered() -> bool:
            return bool(AsyncResult("copy", app=app).successful())

        wait_until(answered, timeout=TIMEOUT, describe=worker.log_tail)
        assert AsyncResult("copy", app=app).result == "value"
        assert row().duplicates == 1
        assert len(ledger.starts("echo")) == 1
