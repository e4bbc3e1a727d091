"""Committed means delivered, rolled back means never seen: for a producer that is killed, and for a broker that is emptied."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from celery import Celery

from celery_idempotent import outbox
from celery_idempotent.core.records import RowFilter, Status
from tests.support.apps import AppSpec, OpenApp
from tests.support.apps.atomic import sell
from tests.support.brokers import Broker
from tests.support.effects import Effect, Effects
from tests.support.kill_points import KILL_PLACES, Victim
from tests.support.ledger import Ledger
from tests.support.waiting import wait_until
from tests.support.worker import ROOT, StartWorker

TIMEOUT = 120.0

pytestmark = pytest.mark.timeout(400)

#: Committed before the broker is emptied: more than recovery publishes at a time.
MESSAGES = 500


@pytest.fixture
def selling(spec: AppSpec) -> AppSpec:
    """Nothing is recovered but by the operator."""
    settings = {**spec.settings, "idempotent_recovery_interval": 0, "worker_prefetch_multiplier": 1}
    return replace(spec, tasks=("tests.support.apps.atomic",), settings=settings)


@pytest.fixture
def app(selling: AppSpec, open_app: OpenApp) -> Celery:
    return open_app(selling)


def recover(spec: AppSpec, directory: Path, *options: str) -> str:
    """Type the operator's command; what it says."""
    command = [sys.executable, "-m", "celery", "-A", "tests.support.apps.worker", "idempotent", "recover", *options]
    environment = {**os.environ, **spec.environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, check=False, cwd=directory, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ran(ledger: Ledger) -> Counter[str]:
    return Counter(entry.detail for entry in ledger.ends("told") if entry.detail)


def wait_for(wanted: Counter[str], ledger: Ledger, app: Celery, log: Sequence[object] = ()) -> None:
    """Wait until all has run and nothing is left to run."""

    def unfinished() -> int:
        statuses = (Status.PENDING, Status.PROCESSING)
        return sum(1 for status in statuses for _ in app.queue_log.store.rows(RowFilter(status=status, limit=9)))

    wait_until(
        lambda: ran(ledger) == wanted and not unfinished(),
        timeout=TIMEOUT,
        describe=lambda: f"{wanted - ran(ledger)} missing, {ran(ledger) - wanted} too many, {unfinished()} not done",
    )


@pytest.mark.parametrize(("store_url", "broker"), KILL_PLACES, indirect=True)
def test_a_producer_that_is_killed_at_any_step(
    selling: AppSpec, app: Celery, start_worker: StartWorker, ledger: Ledger, effects: Effects, tmp_path: Path
) -> None:
    path, names = tmp_path / "steps", []
    for number in range(1, 200):
        names.append(f"sale {number}")
        victim = Victim(
            sell, names[-1], last=number, path=path, log=tmp_path / "victims.log", environment=selling.environment()
        )
        if victim.survives(timeout=TIMEOUT):
            break
    else:
        pytest.fail("there is no end to it")
    committed = effects.names()
    assert names[-1] in committed
    assert 0 < len(committed) < len(names), "some died before their commit, and some behind it"

    said = recover(selling, tmp_path)
    start_worker(selling, concurrency=2)

    assert "never published" in said
    wanted = Counter(f"{name}{what}" for name in committed for what in (": sent", ": first", ": first: second"))
    wait_for(wanted, ledger, app)
    assert effects.names() == committed
    steps = path.read_text()
    assert len(steps.splitlines()) == len(names)
    for step in ("INSERT INTO effects", "INSERT INTO queue_log", "COMMIT", "UPDATE queue_log"):
        assert f"before {step}" in steps
        assert f"after {step}" in steps


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("broker", ["redis", "rabbitmq-quorum"], indirect=True)
def test_a_broker_that_is_emptied(
    selling: AppSpec,
    app: Celery,
    broker: Broker,
    start_worker: StartWorker,
    ledger: Ledger,
    effects: Effects,
    tmp_path: Path,
) -> None:
    """With hundreds of messages that were committed, a hundred of which have run."""
    from sqlalchemy.orm import Session

    names = [f"sale {number}" for number in range(MESSAGES)]
    with Session(effects.engine) as session, outbox(session):
        session.add_all(Effect(name=name) for name in names)
        with outbox():
            for name in names:
                app.tasks["told"].delay(name)
        session.commit()
    worker = start_worker(selling, concurrency=2)
    wait_until(lambda: len(ran(ledger)) >= 100, timeout=TIMEOUT, describe=worker.log_tail)
    worker.terminate()
    before = len(ran(ledger))
    assert before < len(names)

    with app.connection_for_write() as connection:
        channel = connection.default_channel
        if broker.name == "redis":
            channel.client.flushall()
        else:
            # What the worker had taken is given back first.
            wait_until(
                lambda: channel.queue_declare(broker.queue, passive=True).message_count == len(names) - before,
                timeout=TIMEOUT,
                describe="its messages",
            )
            channel.queue_purge(broker.queue)
    said = recover(selling, tmp_path, "--lost-after", "0", "--yes")

    assert "presumed lost" in said
    start_worker(selling, concurrency=2)
    wait_for(Counter(names), ledger, app)
