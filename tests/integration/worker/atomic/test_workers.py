"""Atomic tasks in real workers: killed, overtaken by their leases, retried, cut short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from celery import states
from celery.exceptions import SoftTimeLimitExceeded

from celery_idempotent.core.records import Claim, ProcessedStatus
from tests.support.apps import AppSpec, OpenApp
from tests.support.apps.atomic import LEVEL, POINTS
from tests.support.deployment import Deployment
from tests.support.effects import Effects
from tests.support.waiting import wait_until
from tests.support.worker import StartWorker, WorkerProcess

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE

#: Seconds. Long enough for a busy machine to renew in time.
LEASE = 2.0

TIMEOUT = 90.0

pytestmark = [pytest.mark.parametrize("broker", ["redis"], indirect=True), pytest.mark.timeout(300)]


@dataclass
class AtomicDeployment(Deployment):
    """An app, and workers whose broker delivers again after a second what was not acknowledged."""

    effects: Effects
    start_worker: StartWorker

    def worker(self, **options: Any) -> WorkerProcess:
        return self.start_worker(self.spec, **options)


@pytest.fixture
def deploy(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, effects: Effects
) -> Callable[..., AtomicDeployment]:
    def deploy(**settings: Any) -> AtomicDeployment:
        deployed_spec = replace(
            spec,
            tasks=("tests.support.apps.atomic",),
            transport_options={**spec.transport_options, "visibility_timeout": 1},
            settings={
                **spec.settings,
                "idempotent_lease": LEASE,
                "idempotent_recovery_interval": 1.0,
                **settings,
            },
        )
        return AtomicDeployment(deployed_spec, open_app(deployed_spec), effects, start_worker)

    return deploy


@pytest.mark.parametrize("point", POINTS)
def test_a_child_killed_around_its_commit_leaves_one_effect(
    deploy: Callable[..., AtomicDeployment], point: str
) -> None:
    deployment = deploy()
    worker = deployment.worker()
    flag = Path(f"{deployment.ledger.path}.die-{point}")
    flag.touch()

    result = deployment.send("atomic.put", "paid", link=deployment.app.tasks["told"].s())

    assert result.get(timeout=TIMEOUT) == "paid"
    row = deployment.wait_until_done("atomic.put", result)
    assert not flag.exists(), "nobody was killed"
    assert (row.processed_status, row.token) == (SUCCESS, 2), worker.log_tail()
    assert deployment.effects.names() == ["paid"]
    # A committed body does not run again: the worker that took over sends its callback.
    assert len(deployment.ledger.starts("atomic.put")) == (1 if point == "committed" else 2)
    wait_until(lambda: deployment.ledger.ends("told"), timeout=TIMEOUT, describe=worker.log_tail)


def test_one_of_two_bodies_commits_and_the_other_says_it_did_not(
    deploy: Callable[..., AtomicDeployment],
) -> None:
    deployment = deploy(idempotent_lease=600.0, idempotent_recovery_interval=0)
    first = deployment.worker()
    gate = deployment.gate()
    # SQLite has one writer: there the second body could not even have claimed the message while the first one has written.
    write_first = not deployment.spec.store.startswith("sqlite")

    result = deployment.send("atomic.gated", "paid", str(gate), write_first)
    deployment.wait_for_starts("atomic.gated", result)
    second = deployment.worker()
    held = deployment.row("atomic.gated", result)
    assert deployment.app.queue_log.store.expire(Claim(held.key, held.token))
    starts = deployment.wait_for_starts("atomic.gated", result, 2)
    assert [start.worker for start in starts] == [first.hostname, second.hostname]
    gate.touch()

    assert result.get(timeout=TIMEOUT) == "paid"
    row = deployment.wait_until_done("atomic.gated", result)
    assert (row.processed_status, row.token) == (SUCCESS, 2)
    first.wait_for_log("what its body wrote in its transaction was rolled back", timeout=TIMEOUT)
    assert "its lease ran out before the body ended" in first.log_tail()
    assert "was rolled back" not in second.log_tail()
    assert deployment.effects.names() == ["paid"]


def test_a_body_longer_than_its_lease_runs_once(deploy: Callable[..., AtomicDeployment]) -> None:
    """On SQLite its own write keeps others from renewing, and from taking over."""
    deployment = deploy()
    worker = deployment.worker()
    gate = deployment.gate()

    result = deployment.send("atomic.gated", "paid", str(gate))
    deployment.wait_for_starts("atomic.gated", result)
    began = deployment.row("atomic.gated", result).read_at
    other = deployment.worker()
    wait_until(
        lambda: (deployment.row("atomic.gated", result).read_at - began).total_seconds() > 3 * LEASE,
        timeout=TIMEOUT,
        describe="three leases",
    )
    other.wait_for_log(f"{result.id}] received", timeout=TIMEOUT)
    gate.touch()

    assert result.get(timeout=TIMEOUT) == "paid"
    row = deployment.wait_until_done("atomic.gated", result)
    assert (row.processed_status, row.token) == (SUCCESS, 1), worker.log_tail()
    assert deployment.effects.names() == ["paid"]
    assert len(deployment.ledger.starts("atomic.gated")) == 1


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_long_body_completes_under_repeatable_read(deploy: Callable[..., AtomicDeployment], level: str) -> None:
    """Its lease is renewed by its process and by that one's parent: not in its second run."""
    deployment = deploy(**{LEVEL: level})
    worker = deployment.worker()

    result = deployment.send("atomic.lasting", "paid", LEASE)

    assert result.get(timeout=TIMEOUT) == "paid"
    row = deployment.wait_until_done("atomic.lasting", result)
    assert (row.processed_status, row.token) == (SUCCESS, 1), worker.log_tail()
    assert deployment.effects.names() == ["paid"]
    assert len(deployment.ledger.starts("atomic.lasting")) == 2, worker.log_tail()


@pytest.mark.parametrize("throw", [True, False])
def test_a_retry_rolls_back(deploy: Callable[..., AtomicDeployment], throw: bool) -> None:
    deployment = deploy()
    deployment.worker()

    result = deployment.send("atomic.retry", "paid", 2, throw)

    assert result.get(timeout=TIMEOUT) == 2
    row = deployment.wait_until_done("atomic.retry", result)
    assert (row.processed_status, row.attempt, row.token) == (SUCCESS, 2, 3)
    assert deployment.effects.names() == ["paid"]


def test_a_message_that_replaces_itself_keeps_what_each_run_did(deploy: Callable[..., AtomicDeployment]) -> None:
    deployment = deploy()
    deployment.worker()

    result = deployment.send("atomic.pages", "p", 2)

    assert result.get(timeout=TIMEOUT) == "the last"
    assert (deployment.wait_until_done("atomic.pages", result).processed_status) is SUCCESS
    assert deployment.effects.names() == ["p:0", "p:1", "p:2"]


def test_a_replacement_is_sent_after_the_commit(deploy: Callable[..., AtomicDeployment]) -> None:
    deployment = deploy()
    deployment.worker()

    result = deployment.send("atomic.replaced", "paid")

    assert result.get(timeout=TIMEOUT) == "paid"
    assert (deployment.wait_until_done("atomic.replaced", result).processed_status) is SUCCESS
    assert deployment.effects.names() == ["paid"]
    assert sorted(entry.detail or "" for entry in deployment.ledger.ends("told")) == ["paid", "paid and more"]


def test_a_soft_time_limit_rolls_back(deploy: Callable[..., AtomicDeployment]) -> None:
    deployment = deploy()
    worker = deployment.worker()

    result = deployment.send("atomic.limited", "paid")

    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), SoftTimeLimitExceeded)
    row = deployment.wait_until_done("atomic.limited", result)
    assert (row.processed_status, result.state) == (FAILURE, states.FAILURE)
    assert deployment.effects.names() == []
    # Its process goes on with another connection.
    after = deployment.send("atomic.put", "after")
    assert after.get(timeout=TIMEOUT) == "after", worker.log_tail()
    assert deployment.effects.names() == ["after"]
