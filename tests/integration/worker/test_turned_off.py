"""A task whose guard was turned off: new calls are not recorded, and what was recorded is completed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from celery import Celery, Task

from celery_idempotent import IdempotentTask, QueueLog
from celery_idempotent.core.records import MessageKey, NewMessage, ProcessedStatus, RowFilter, Status
from celery_idempotent.message.header import Header
from celery_idempotent.message.serialization import encode_message
from tests.support.apps import AppSpec, OpenApp
from tests.support.ledger import Ledger
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import StartWorker

on_redis = pytest.mark.parametrize("broker", ["redis"], indirect=True)
on_sqlite = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


@on_redis
@on_sqlite
def test_recorded_messages_complete_and_new_calls_are_not_recorded(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger
) -> None:
    spec = replace(spec, tasks=("tests.support.apps.generic", "tests.support.apps.outcomes"))
    on, off = open_app(spec), replace(spec, settings={"idempotent_enabled": False})
    recorded = on.tasks["autoretry"].apply_async((1,), message_id="recorded")
    start_worker(off)
    app = open_app(off)

    assert recorded.get(timeout=TIMEOUT) == 1
    new = [app.tasks["echo"].apply_async((number,), message_id="new") for number in range(2)]
    copy = app.tasks["autoretry"].apply_async((1,), message_id="recorded")

    assert [result.get(timeout=TIMEOUT) for result in new] == [0, 1]
    assert copy.get(timeout=TIMEOUT) == 1
    assert not any(result.duplicate for result in (*new, copy))
    store = on.queue_log.store
    row = wait_until(
        lambda: next((row for row in store.rows(RowFilter()) if row.status is Status.DONE), None), describe="the row"
    )
    assert (row.key, row.processed_status, row.attempt) == (
        MessageKey("recorded", "autoretry"),
        ProcessedStatus.SUCCESS,
        1,
    )
    assert [row.key.message_id for row in store.rows(RowFilter())] == ["recorded"]
    # A copy of the recorded message is one, whether the task is turned on or off.
    on.tasks["autoretry"].publish(
        (1,),
        {},
        task_id=recorded.id,
        message_id="recorded",
        headers=Header("recorded", "autoretry", recorded.id).write({}),
    )
    wait_until(lambda: store.find(row.key).duplicates == 1, describe="the copy is skipped")
    assert len(ledger.starts("autoretry", task_id=recorded.id)) == 2  # and its retry


def test_an_atomic_body_has_its_transaction_all_the_same(tmp_path: Path) -> None:
    app = Celery("off", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idempotent_store=f"sqlite:///{tmp_path}/log.db")

    @app.task(base=IdempotentTask, bind=True, atomic=True, idempotent=False, shared=False)
    def settle(self: IdempotentTask) -> int:
        return int(self.connection.exec_driver_sql("SELECT 7").scalar_one())

    assert settle.apply().get() == 7
    assert list(app.queue_log.store.rows(RowFilter())) == []
    app.queue_log.close()
    app.close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_message_that_ran_without_its_base_is_done(tmp_path: Path, fails: bool) -> None:
    """``base=IdempotentTask`` was dropped while it waited: put back, recovery has nothing to publish."""
    app = Celery("dropped", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idempotent_store=f"sqlite:///{tmp_path}/log.db")
    ran = []

    @app.task(name="mail", base=Task, shared=False)
    def mail(order: str) -> None:
        ran.append(order)
        if fails:
            raise ValueError("no such order")

    store, key = QueueLog.of(app).store, MessageKey("order:1", "mail")
    message = encode_message(("o-1",), {}, {}, serializer="json")
    store.record(NewMessage(key, "task-1", message=message))

    mail.apply(("o-1",), task_id="task-1", headers=Header("order:1", "mail", "task-1").write(None))

    row = store.find(key)
    assert ran == ["o-1"]
    assert row is not None
    assert row.status is Status.DONE
    assert row.processed_status is (ProcessedStatus.FAILURE if fails else ProcessedStatus.SUCCESS)
    app.queue_log.close()
    app.close()


def test_a_message_for_an_app_without_a_log_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = Celery("stranger", broker="memory://", backend="cache+memory://", set_as_current=False)

    @app.task(name="mail", base=Task, shared=False)
    def mail() -> None: ...

    mail.apply(task_id="task-1", headers=Header("order:1", "mail", "task-1").write(None))

    assert list(tmp_path.iterdir()) == []
    assert "queue_log" not in vars(app)
    app.close()
