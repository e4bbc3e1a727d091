"""The guard is off: calls are not recorded, each message runs, and a recorded one has its row ended."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from celery import Celery, Task, chain, chord

from celery_idempotent import IdempotentTask, QueueLog
from celery_idempotent.core.records import MessageKey, NewMessage, ProcessedStatus, RowFilter, Status
from celery_idempotent.maintenance.rescue import Rescue
from celery_idempotent.message.header import Header
from celery_idempotent.message.serialization import encode_message
from tests.support.apps import AppSpec, OpenApp
from tests.support.ledger import Ledger
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import StartWorker

on_redis = pytest.mark.parametrize("broker", ["redis"], indirect=True)
#: In PostgreSQL, or in the broker's Redis.
on_each_store = pytest.mark.parametrize("in_redis", [False, True], ids=["postgresql", "redis"])
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
    # A copy of it runs, as a plain task's does.
    on.tasks["autoretry"].publish(
        (0,),
        {},
        task_id=recorded.id,
        message_id="recorded",
        headers=Header("recorded", "autoretry", recorded.id).write({}),
    )
    wait_until(lambda: len(ledger.starts("autoretry", task_id=recorded.id)) == 3, describe="the copy runs")
    after = store.find(row.key)
    assert after == replace(row, read_at=after.read_at)


@on_redis
@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
@on_each_store
def test_calls_sent_while_it_was_off_are_guarded_by_a_worker_where_it_is_on(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger, in_redis: bool
) -> None:
    spec = replace(spec, store=spec.backend) if in_redis else spec
    on = open_app(spec)
    off = open_app(replace(spec, settings={"idempotent_enabled": False}))
    results = [off.tasks["echo"].apply_async((1,), message_id="order:1") for _ in range(2)]
    assert list(on.queue_log.store.rows(RowFilter())) == []

    start_worker(spec)

    assert [result.get(timeout=TIMEOUT) for result in results] == [1, 1]
    assert len(ledger.starts("echo")) == 1
    row = on.queue_log.store.find(MessageKey("order:1", "echo"))
    assert (row.status, row.duplicates) == (Status.DONE, 1)
    assert on.tasks["echo"].apply_async((1,), message_id="order:1").duplicate


@on_redis
@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
@on_each_store
def test_what_waited_while_it_was_off_runs_again_only_by_name(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger, in_redis: bool
) -> None:
    """Of one message the row could not be ended, the broker has lost the other: recovery cannot tell them apart."""
    settings = {"idempotent_recovery_interval": 1, "idempotent_lost_after": 1}
    spec = replace(spec, settings=settings, store=spec.backend if in_redis else spec.store)
    app, off = open_app(spec), replace(spec, settings={**settings, "idempotent_enabled": False})
    store = app.queue_log.store
    keys = [MessageKey(name, "echo") for name in ("ran", "lost")]
    for key in keys:
        message = encode_message((key.message_id,), {}, {}, serializer="json")
        store.record(NewMessage(key, f"task-{key.message_id}", queue=spec.queue, message=message))
    worker = start_worker(off)
    wait_until(lambda: all(store.find(key).may_have_run for key in keys), describe="the notes")
    log = worker.log.read_text()
    assert "the guard is off for all tasks, since idempotent_enabled is False" in log
    worker.stop()

    start_worker(spec)
    for number in range(3):  # they overtake those, again and again
        app.tasks["echo"].apply_async((number,), message_id=f"later:{number}").get(timeout=TIMEOUT)
        time.sleep(1.5)
    assert app.tasks["echo"].apply_async(("ran",), message_id="ran").duplicate
    assert [store.find(key).status for key in keys] == [Status.PENDING, Status.PENDING]
    assert Rescue.of(app.queue_log).publish_waiting(0.0) == 0

    assert store.forget(store.find(keys[0]))
    assert Rescue.of(app.queue_log).publish_waiting(0.0, task="echo") == 1
    wait_until(lambda: store.find(keys[1]).status is Status.DONE, describe="the named one")
    assert [note.task_id for note in ledger.starts("echo")][-1] == "task-lost"
    assert len(ledger.starts("echo")) == 4


@on_redis
@on_sqlite
def test_a_row_whose_owner_died_is_ended_by_the_copy_that_runs(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker
) -> None:
    app = open_app(spec)
    store, key = app.queue_log.store, MessageKey("order:1", "echo")
    message = NewMessage(key, "task-1", message=encode_message((1,), {}, {}, serializer="json"))
    claimed = store.claim(message, worker="dead:1", lease=60.0, grace=0.0)
    store.expire(claimed.claim)
    start_worker(replace(spec, settings={"idempotent_enabled": False}))

    app.tasks["echo"].publish(
        (1,), {}, task_id="task-1", message_id="order:1", headers=Header("order:1", "echo", "task-1").write({})
    )

    wait_until(lambda: store.find(key).status is Status.DONE, describe="the row")
    assert store.find(key).processed_status is ProcessedStatus.SUCCESS


@on_redis
@on_sqlite
@pytest.mark.parametrize("sent", ["recorded", "unrecorded"])
def test_a_canvas_goes_on_in_workers_whose_guard_is_off(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, sent: str
) -> None:
    off = replace(spec, settings={"idempotent_enabled": False})
    start_worker(off)
    app = open_app(spec if sent == "recorded" else off)
    add, echo, retry = (app.tasks[name] for name in ("add", "echo", "retry_n"))
    results = [
        chain(add.s(1, 2), add.s(3), echo.s()).apply_async(),
        chord([add.s(1, 1), add.s(2, 2), retry.s(1)], echo.s()).apply_async(),
        echo.apply_async((7,), link=echo.s()),
    ]
    assert [result.get(timeout=TIMEOUT) for result in results] == [6, [2, 4, 1], 7]
    store = open_app(spec).queue_log.store
    wait_until(
        lambda: all(row.status is Status.DONE for row in store.rows(RowFilter())),
        describe="the rows of what was recorded",
    )


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
