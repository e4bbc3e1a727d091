"""Eight processes call at once with the same ids: each message is recorded once, runs once, and answers every caller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from celery_idempotent.core.records import RowFilter
from celery_idempotent.queue_log import QueueLog
from tests.conftest import StartWorker
from tests.support.apps import AppSpec, OpenApp
from tests.support.callers import Callers, start_callers
from tests.support.deployment import unique
from tests.support.ledger import Ledger

PROCESSES = 8

pytestmark = [
    # The processes are started once.
    pytest.mark.xdist_group("callers"),
    # Ten processes that write one SQLite file in turn, on a machine that has other things to do.
    pytest.mark.timeout(300),
    pytest.mark.parametrize("broker", ["redis"], indirect=True),
]


@pytest.fixture(scope="module")
def callers() -> Iterator[Callers]:
    with start_callers(PROCESSES) as callers:
        yield callers


@pytest.fixture
def spec(spec: AppSpec) -> AppSpec:
    return replace(spec, tasks=("tests.support.apps.scenarios",))


def test_8_processes_call_at_once_with_the_same_200_ids(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, ledger: Ledger, callers: Callers
) -> None:
    ids = [unique("message") for _ in range(200)]
    store = QueueLog.of(open_app(spec)).store
    start_worker(spec, concurrency=2)

    outcomes = [outcome for process in callers.call(spec, "once", ids) for outcome in process]

    assert Counter(entry.detail for entry in ledger.starts()) == dict.fromkeys(ids, 1)
    rows = {row.key.message_id: row for row in store.rows(RowFilter(limit=1000))}
    assert sorted(rows) == sorted(ids)
    assert {(row.status, row.processed_status, row.token) for row in rows.values()} == {("done", "success", 1)}
    assert {row.duplicates for row in rows.values()} == {PROCESSES - 1}
    # One of eight sent it, all have the AsyncResult of that one, and the value of the one run.
    assert Counter(outcome.message_id for outcome in outcomes if not outcome.duplicate) == dict.fromkeys(ids, 1)
    assert {(outcome.message_id, outcome.task_id) for outcome in outcomes} == {(m, rows[m].task_id) for m in ids}
    assert len({(outcome.message_id, outcome.value) for outcome in outcomes}) == len(ids)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_8_processes_call_plain_celery_at_once_with_the_same_20_ids(
    spec: AppSpec, start_worker: StartWorker, ledger: Ledger, callers: Callers
) -> None:
    spec = replace(spec, base="plain")
    ids = [unique("message") for _ in range(20)]
    start_worker(spec, concurrency=2)

    outcomes = [outcome for process in callers.call(spec, "once", ids) for outcome in process]

    assert Counter(entry.detail for entry in ledger.starts()) == dict.fromkeys(ids, PROCESSES)
    assert len({outcome.value for outcome in outcomes}) == PROCESSES * len(ids)
