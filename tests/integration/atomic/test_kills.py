"""A worker that is killed at any step of an atomic task, which sends a message and is part of a chain, leaves nothing undone or doubled."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from celery import chain

from celery_idempotent.records import RowFilter, Status
from tests.support.apps import AppSpec, OpenApp
from tests.support.brokers import Broker
from tests.support.effects import Effects
from tests.support.ledger import Ledger
from tests.support.steps import Victim, work
from tests.support.waiting import wait_until
from tests.support.worker import StartWorker

PATIENCE = 120.0

#: Seconds.
LEASE = 2.0

TASK = "atomic.order"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("broker", ["redis", "rabbitmq-quorum"], indirect=True)
def test_a_kill_at_any_step_loses_and_doubles_nothing(
    spec: AppSpec,
    broker: Broker,
    open_app: OpenApp,
    start_worker: StartWorker,
    ledger: Ledger,
    effects: Effects,
    tmp_path: Path,
) -> None:
    redelivers = {"visibility_timeout": 1} if broker.name == "redis" else {}
    spec = replace(
        spec,
        tasks=("tests.support.apps.atomic",),
        transport_options={**spec.transport_options, **redelivers},
        settings={**spec.settings, "idempotent_lease": LEASE, "idempotent_recovery_interval": 1.0},
    )
    app = open_app(spec)
    order, told = app.tasks[TASK], app.tasks["told"]
    aside, path = broker.other_queue("aside"), tmp_path / "steps"
    results, queues = {}, [aside]
    for number in range(1, 200):
        name, queue = f"order {number}", broker.other_queue(str(number))
        queues.append(queue)
        first = order.s(name, aside).set(queue=queue)
        results[name] = chain(first, told.s(": chained").set(queue=aside), app=app).delay()
        victim = Victim(
            *(work, TASK, queue, f"victim-{number}@test"),
            last=number,
            path=path,
            log=tmp_path / f"victim-{number}.log",
            environment=spec.environment(),
        )
        if victim.survives(timeout=PATIENCE):
            break
    else:
        pytest.fail("there is no end to it")

    rescuer = start_worker(spec, concurrency=3, queues=queues)
    for name, result in results.items():
        assert result.get(timeout=PATIENCE) == name, rescuer.log_tail()
        assert result.parent.get(timeout=PATIENCE) == name, rescuer.log_tail()
    wanted = Counter([f"{name}{what}" for name in results for what in (": sent", ": chained")])

    def noted() -> Counter[str]:
        return Counter(entry.detail for entry in ledger.ends("told") if entry.detail)

    def unfinished() -> list[str]:
        statuses = (Status.PENDING, Status.PROCESSING)
        return [str(row) for status in statuses for row in app.queue_log.store.rows(RowFilter(status=status))]

    wait_until(
        lambda: noted() == wanted and not unfinished(),
        timeout=PATIENCE,
        describe=lambda: (
            f"{wanted - noted()} missing, {noted() - wanted} too many, {unfinished()}\n{rescuer.log_tail()}"
        ),
    )
    assert effects.names() == sorted(results)
    steps = path.read_text()
    assert len(steps.splitlines()) == len(results)
    publishes = "AMQP publish" if broker.name.startswith("rabbitmq") else "Redis"
    for step in (
        "'INSERT INTO effects",
        "'INSERT INTO queue_log",
        "'UPDATE queue_log",
        "COMMIT",
        publishes,
        "the acknowledgement",
    ):
        assert f"before {step}" in steps
        assert f"after {step}" in steps
