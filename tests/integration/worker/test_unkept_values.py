"""Values and errors that the database does not take: the outcome is written without them, and the body runs once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pymysql
import pytest
import sqlalchemy as sa
from celery import Celery

from celery_idempotent.core.records import MessageKey, NoResultReason, ProcessedStatus, Row, Status
from tests.support.apps import AppSpec, OpenApp
from tests.support.ledger import Ledger
from tests.support.waiting import wait_until
from tests.support.worker import StartWorker

MB = 1_000_000
TIMEOUT = 100.0

#: Whether the driver sends two bytes for each one. PyMySQL before 1.2 escapes what has to be escaped.
HEXADECIMAL = pymysql.VERSION >= (1, 2)

pytestmark = [pytest.mark.parametrize("broker", ["redis"], indirect=True), pytest.mark.timeout(240)]


def done(app: Celery, task: str, message_id: str) -> Row:
    def done() -> Row | None:
        row: Row | None = app.queue_log.store.find(MessageKey(message_id, task))
        return row if row is not None and row.status is Status.DONE else None

    return wait_until(done, timeout=TIMEOUT, describe=f"the end of {task}[{message_id}]")


@pytest.mark.parametrize("store_url", ["mariadb"], indirect=True)
def test_a_result_beyond_the_largest_packet_is_not_kept(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger
) -> None:
    """Binary is sent in hexadecimal: 9 MB are more than the 16 MB of ``max_allowed_packet``. The server closes the connection on 17 MB."""
    spec = replace(spec, tasks=("tests.support.apps.keeping",))
    app = open_app(spec)
    start_worker(spec)

    results = {
        (task, size): app.tasks[task].delay(size)
        for task in ("large", "large.atomic")
        for size in (MB, 9 * MB, 17 * MB)
    }
    retried = app.tasks["large.retry"].delay(17 * MB)

    for (task, size), result in results.items():
        assert len(result.get(timeout=TIMEOUT)) == size
        row = done(app, task, result.id)
        kept = size == MB or (size == 9 * MB and not HEXADECIMAL)
        assert (row.processed_status, row.error) == (ProcessedStatus.SUCCESS, None if kept else NoResultReason.UNKEPT)
        assert (row.result is not None) is kept
        # A body whose transaction was lost with the connection is run again in a new one.
        assert len(ledger.starts(task, task_id=result.id)) <= (1 if task == "large" or kept else 3)
    assert retried.get(timeout=TIMEOUT) == 17 * MB
    assert [start.retries for start in ledger.starts("large.retry", task_id=retried.id)] == [0, 1]


@contextmanager
def database(url: str, encoding: str) -> Iterator[str]:
    """Yield a PostgreSQL database of an encoding."""
    name = f"test_{uuid4().hex[:12]}"
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.execute(
            sa.text(f"CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
        )
    yield sa.make_url(url).set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"client_encoding": "utf8"}], ids=["the driver's", "the server's"])
def test_an_error_outside_of_the_character_set_is_kept_in_ascii(
    spec: AppSpec,
    open_app: OpenApp,
    start_worker: StartWorker,
    ledger: Ledger,
    postgresql_url: str,
    options: dict[str, Any],
) -> None:
    with database(postgresql_url, "LATIN1") as url:
        store = sa.make_url(url).update_query_dict(options).render_as_string(hide_password=False)
        spec = replace(spec, tasks=("tests.support.apps.keeping",), store=store)
        app = open_app(spec)
        worker = start_worker(spec)

        result = app.tasks["wail"].delay("käse, 注文, \0")

        assert "注文" in str(result.get(timeout=TIMEOUT, propagate=False))
        row = done(app, "wail", result.id)
        assert (row.processed_status, row.error) == (
            ProcessedStatus.FAILURE,
            "ValueError: k\\xe4se, \\u6ce8\\u6587, \\x00",
        )
        assert len(ledger.starts("wail", task_id=result.id)) == 1
        worker.stop()
