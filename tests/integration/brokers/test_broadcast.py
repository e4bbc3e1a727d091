"""A fanout exchange: each worker runs a message once, and gets no second copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_idempotent.core.records import MessageKey, ProcessedStatus, RowFilter, Status
from tests.support.apps import AppSpec, OpenApp
from tests.support.brokers import Broker
from tests.support.ledger import Ledger
from tests.support.waiting import wait_until
from tests.support.worker import StartWorker

pytestmark = [
    pytest.mark.parametrize("store_url", ["sqlite"], indirect=True),
    pytest.mark.parametrize("broker", ["redis", "rabbitmq-classic"], indirect=True),
]

SENDS: dict[str, Callable[[Celery, str, str, str], Any]] = {
    "apply_async": lambda app, queue, gate, m: app.tasks["gated"].apply_async((gate,), queue=queue, message_id=m),
    "by name": lambda app, queue, gate, m: app.send_task("gated", (gate,), queue=queue, message_id=m),
}


@pytest.mark.parametrize("how", SENDS)
def test_each_worker_runs_a_broadcast_once(
    spec: AppSpec,
    broker: Broker,
    open_app: OpenApp,
    start_worker: StartWorker,
    ledger: Ledger,
    tmp_path: Path,
    how: str,
) -> None:
    news = broker.other_queue("news")
    # Recovery looks often, and finds much too old what is a second old.
    settings = {**spec.settings, "idempotent_recovery_interval": 0.5, "idempotent_lost_after": 1}
    tasks = ("tests.support.apps.generic", "tests.support.apps.routing")
    told = replace(spec, settings=settings, tasks=tasks)
    app = open_app(told)
    app.set_current()
    for _ in range(2):
        start_worker(told, pool="threads", concurrency=3, queues=[news])
    with app.producer_pool.acquire(block=True) as producer:
        # On Redis, kombu knows an exchange's type on the connection that has declared it.
        app.amqp.queues[news].exchange(producer.channel).declare()
    gate = str(tmp_path / "gate")

    SENDS[how](app, news, gate, "m-1")
    wait_until(lambda: len(ledger.starts("gated")) >= 2)
    row = app.queue_log.store.find(MessageKey("m-1", "gated"))
    assert row is not None
    assert (row.status, row.processed_status, row.error) == (Status.DONE, ProcessedStatus.SUCCESS, "broadcast")
    # The broker delivers it once more to each.
    app.tasks["gated"].publish((gate,), {}, task_id=row.task_id, message_id="m-1", queue=news)
    wait_until(lambda: sum(r.duplicates for r in rows(app)) >= 2, describe=lambda: f"{rows(app)}")
    Path(gate).touch()

    wait_until(lambda: all(r.status is Status.DONE for r in rows(app)))
    assert len(ledger.starts("gated")) == 2
    assert len(rows(app)) == 3
    assert app.tasks["gated"].apply_async((gate,), queue=news, message_id="m-1").duplicate


def rows(app: Celery) -> Any:
    return list(app.queue_log.store.rows(RowFilter()))
