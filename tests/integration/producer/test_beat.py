"""Schedules: two beats that fire the same entry send one message."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.beat import ScheduleEntry, Scheduler

from celery_idempotent.core.records import ProcessedStatus
from tests.support.apps import AppSpec, close_app
from tests.support.deployment import unique
from tests.support.processes import kill_tree
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import ROOT

SUCCESS = ProcessedStatus.SUCCESS


@contextmanager
def beat(spec: AppSpec, schedule: dict[str, Any], directory: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a ``celery beat`` with a schedule and a file of its own."""
    settings = {**spec.settings, "beat_schedule": schedule, "beat_max_loop_interval": 0.2}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "celery", "-A", "tests.support.apps.worker", "beat", "--loglevel=INFO"),
                *(f"--schedule={directory / (log.stem + '.db')}", "--pidfile="),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(ROOT), **replace(spec, settings=settings).environment()},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill_tree(process)


def test_two_beats_send_each_entry_once(shared_worker: SharedWorker, tmp_path: Path) -> None:
    """Two ``celery beat`` processes; the entries' ids are fixed, so all that they ever send of one is one message."""
    by_id, order = unique(), unique("order")
    schedule = {
        "by id": {"task": "echo", "schedule": 0.5, "args": ["tick"], "options": {"message_id": by_id}},
        "by format": {"task": "order.raise", "schedule": 0.5, "args": [order]},
    }
    logs = [tmp_path / "beat-1.log", tmp_path / "beat-2.log"]

    def fired(log: Path, name: str) -> int:
        return log.read_text(errors="replace").count(f"Scheduler: Sending due task {name}") if log.exists() else 0

    with (
        beat(shared_worker.spec, schedule, tmp_path, logs[0]) as first,
        beat(shared_worker.spec, schedule, tmp_path, logs[1]) as second,
    ):
        wait_until(
            lambda: all(fired(log, name) >= 3 for log in logs for name in schedule),
            timeout=2 * TIMEOUT,
            describe=lambda: "\n".join(log.read_text() for log in logs if log.exists()),
        )
        # Nothing of the library delays a beat that is stopped.
        for process in (first, second):
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=TIMEOUT) == 0

    rows = [
        shared_worker.wait_until_done("echo", by_id),
        shared_worker.wait_until_done("order.raise", f"order:{order}"),
    ]
    assert [(row.processed_status, row.token) for row in rows] == [(SUCCESS, 1), (SUCCESS, 1)]
    assert [row.duplicates >= 3 for row in rows] == [True, True]
    assert (len(shared_worker.starts("echo", by_id)), len(shared_worker.starts("order.raise", f"order:{order}"))) == (
        1,
        1,
    )
    # A duplicate that is raised is an entry in beat's log, and beat goes on.
    assert "DuplicateMessageError" in logs[0].read_text() + logs[1].read_text()


@pytest.fixture
def schedulers(shared_worker: SharedWorker) -> Iterator[list[Scheduler]]:
    """Yield what two beats are made of; the second one does not import the tasks, and sends by name."""
    apps = [shared_worker.spec.build(), Celery("beat", broker=shared_worker.spec.broker, set_as_current=False)]
    apps[1].conf.update(task_default_queue=shared_worker.spec.queue, result_backend=shared_worker.spec.backend)
    yield [Scheduler(app, lazy=True) for app in apps]
    for app in apps:
        close_app(app)


def test_a_beat_without_the_tasks_is_guarded_by_the_consumer(
    shared_worker: SharedWorker, schedulers: list[Scheduler]
) -> None:
    m = unique()

    def apply(scheduler: Scheduler) -> Any:
        entry = ScheduleEntry(
            name="every day",
            task="echo",
            schedule=timedelta(days=1),
            args=("tick",),
            options={"message_id": m},
            app=scheduler.app,
        )
        return scheduler.apply_async(entry, advance=False)

    results = [apply(scheduler) for scheduler in (*schedulers, *schedulers)]

    assert [shared_worker.app.AsyncResult(result.id).get(timeout=TIMEOUT) for result in results] == ["tick"] * 4
    shared_worker.assert_done("echo", m, SUCCESS, starts=1, token=1, duplicates=3)
