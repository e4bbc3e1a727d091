"""``celery inspect idempotency``: the claims that a worker holds, in each kind of pool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.support.apps import AppSpec, OpenApp
from tests.support.brokers import Broker, redis_broker
from tests.support.ledger import Ledger
from tests.support.servers import PrivatePostgreSQL, PrivateRedis
from tests.support.stores import sqlite_store
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import ROOT, Pool, StartWorker, WorkerProcess


def ask(app: Celery, worker: WorkerProcess) -> list[dict[str, Any]]:
    """Return what the worker answers."""
    inspect = app.control.inspect(destination=[worker.hostname], timeout=TIMEOUT, limit=1)
    answers = wait_until(lambda: inspect._request("idempotency"), describe="an answer")
    found: list[dict[str, Any]] = answers[worker.hostname]
    return found


def run_command(spec: AppSpec, worker: WorkerProcess, *arguments: str) -> str:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "celery", "-A", "tests.support.apps.worker", "inspect", "idempotency"),
            *("--destination", worker.hostname, "--timeout", "10", *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, **spec.environment()},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return sqlite_store(tmp_path)


@pytest.fixture
def broker(private_redis: PrivateRedis) -> Broker:
    return redis_broker(private_redis.url)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def run(spec: AppSpec, open_app: OpenApp, ledger: Ledger, gate: Path) -> Callable[[], tuple[Celery, list[Any]]]:
    """Have two messages run, which end when the gate is there."""

    def run() -> tuple[Celery, list[Any]]:
        app = open_app(spec)
        results = [app.tasks["gated"].apply_async((str(gate), "secret"), message_id=name) for name in ("m-1", "m-2")]
        wait_until(lambda: len(ledger.starts("gated")) == 2, describe="two that run")
        return app, results

    return run


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_a_worker_tells_what_it_has_claimed(
    spec: AppSpec,
    start_worker: StartWorker,
    ledger: Ledger,
    gate: Path,
    run: Callable[[], tuple[Celery, list[Any]]],
    pool: Pool,
) -> None:
    spec = replace(spec, settings={**spec.settings, "idempotent_lease": 30.0})
    worker = start_worker(spec, pool=pool, concurrency=3)
    app, results = run()

    claims = ask(app, worker)
    pids = {entry.message_id: entry.pid for entry in ledger.starts("gated")}
    assert sorted((c["message_id"], c["task_id"], c["pid"]) for c in claims) == [
        (name, result.id, pids[name]) for name, result in zip(("m-1", "m-2"), results, strict=True)
    ]
    for claim in claims:
        assert (claim["task_name"], claim["token"], claim["attempt"], claim["lease"]) == ("gated", 1, 0, 30.0)
        assert 20.0 < claim["lease_left"] <= 30.0
        assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(claim["since"]) < timedelta(seconds=30)
    if pool == "prefork":
        assert {claim["pid"] for claim in claims} <= {child.pid for child in worker.children()}
    # Neither their arguments nor anything else.
    assert "secret" not in json.dumps(claims)

    gate.touch()
    wait_until(lambda: ask(app, worker) == [], describe=lambda: f"no claims: {ask(app, worker)}")


def test_a_copy_that_is_held_is_no_claim(
    spec: AppSpec, start_worker: StartWorker, gate: Path, run: Callable[[], tuple[Celery, list[Any]]], open_app: OpenApp
) -> None:
    worker = start_worker(spec, concurrency=3)
    app, results = run()
    plain = open_app(replace(spec, base="plain"))
    plain.tasks["gated"].apply_async((str(gate), "secret"), message_id="m-1", task_id=results[0].id)
    worker.wait_for_log("gated[m-1] is held for")

    assert sorted(claim["message_id"] for claim in ask(app, worker)) == ["m-1", "m-2"]
    gate.touch()


def test_the_command_prints_them_and_has_json(
    spec: AppSpec, start_worker: StartWorker, gate: Path, run: Callable[[], tuple[Celery, list[Any]]]
) -> None:
    worker = start_worker(spec, concurrency=2)
    _, results = run()

    (claims,) = json.loads(run_command(spec, worker, "--json")).values()
    assert {claim["message_id"]: claim["task_id"] for claim in claims} == {"m-1": results[0].id, "m-2": results[1].id}
    text = run_command(spec, worker)
    assert "m-1" in text
    assert results[1].id in text
    gate.touch()


def test_a_solo_worker_answers_when_it_is_free(spec: AppSpec, open_app: OpenApp, start_worker: StartWorker) -> None:
    worker = start_worker(spec, pool="solo")
    app = open_app(spec)
    assert app.tasks["add"].delay(1, 1).get(timeout=TIMEOUT) == 2
    assert ask(app, worker) == []


def test_a_silent_store_leaves_claims_without_tokens(
    spec: AppSpec,
    open_app: OpenApp,
    start_worker: StartWorker,
    ledger: Ledger,
    gate: Path,
    private_postgresql: PrivatePostgreSQL,
) -> None:
    spec = replace(spec, store=private_postgresql.url)
    app = open_app(spec)
    worker = start_worker(spec)
    app.tasks["gated"].apply_async((str(gate),), message_id="m-1")
    wait_until(lambda: ledger.starts("gated"), describe="a body that runs")
    private_postgresql.kill()

    (claim,) = ask(app, worker)
    assert (claim["message_id"], claim["token"]) == ("m-1", None)
    assert 0 < claim["lease_left"] <= 60
    worker.wait_for_log("listed without tokens")


def test_the_command_is_listed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "celery", "inspect", "--list"], capture_output=True, text=True, check=True
    )
    assert "idempotency" in done.stdout
    assert "List the messages that this worker has claimed" in " ".join(done.stdout.split())
