"""A worker that is killed at any step of a task, which sends a message and is part of a chain.

Of an atomic task nothing is lost or doubled. Of a plain one the effect of its body is doubled in one window, and nothing else.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from celery import chain

from celery_idempotent.core.records import RowFilter, Status
from tests.support.apps import AppSpec, OpenApp
from tests.support.brokers import Broker
from tests.support.effects import Effects
from tests.support.kill_points import Victim, work
from tests.support.ledger import Ledger
from tests.support.waiting import wait_until
from tests.support.worker import StartWorker

TIMEOUT = 120.0

#: Seconds.
LEASE = 2.0

pytestmark = pytest.mark.timeout(1200)

on_both_brokers = pytest.mark.parametrize("broker", ["redis", "rabbitmq-quorum"], indirect=True)

#: Kills a worker at each step of a task, has what they leave done, and tells which steps those were and whose messages.
KillAtEveryStep = Callable[[str], tuple[list[str], list[str]]]


@pytest.fixture
def orm() -> str | None:
    """The Django app of the project that the workers are processes of; ``None`` for plain Celery, with SQLAlchemy's session."""
    return None


@pytest.fixture
def kill_at_every_point(
    spec: AppSpec,
    orm: str | None,
    broker: Broker,
    open_app: OpenApp,
    start_worker: StartWorker,
    ledger: Ledger,
    tmp_path: Path,
) -> KillAtEveryStep:
    def kill_at_every_point(task: str) -> tuple[list[str], list[str]]:
        return _kill_at_every_step(task, replace(spec, orm=orm), broker, open_app, start_worker, ledger, tmp_path)

    return kill_at_every_point


def _kill_at_every_step(
    task: str,
    spec: AppSpec,
    broker: Broker,
    open_app: OpenApp,
    start_worker: StartWorker,
    ledger: Ledger,
    tmp_path: Path,
) -> tuple[list[str], list[str]]:
    redelivers = {"visibility_timeout": 1} if broker.name == "redis" else {}
    spec = replace(
        spec,
        tasks=("tests.support.apps.atomic",),
        transport_options={**spec.transport_options, **redelivers},
        settings={**spec.settings, "idempotent_lease": LEASE, "idempotent_recovery_interval": 1.0},
    )
    app = open_app(spec)
    order, told = app.tasks[task], app.tasks["told"]
    aside = broker.other_queue("aside")
    results, queues = {}, [aside]
    steps: list[str] = []
    last = 1
    for number in range(1, 200):
        path = tmp_path / f"step-{number}"
        name, queue = f"order {number}", broker.other_queue(str(number))
        queues.append(queue)
        first = order.s(name, aside).set(queue=queue)
        results[name] = chain(first, told.s(": chained").set(queue=aside), app=app).delay()
        victim = Victim(
            *(work, task, queue, f"victim-{number}@test"),
            last=last,
            path=path,
            log=tmp_path / f"victim-{number}.log",
            environment=spec.environment(),
        )
        survived = victim.survives(timeout=TIMEOUT)
        steps.append(path.read_text().strip().partition(" ")[2])
        if not survived:
            last += 1
        elif {"before the acknowledgement", "after the acknowledgement"} <= set(steps):
            break
        else:
            last -= 4  # a slow one has looked for messages meanwhile, and so has had more steps
    else:
        pytest.fail("there is no end to it")

    rescuer = start_worker(spec, concurrency=3, queues=queues)
    for name, result in results.items():
        assert result.get(timeout=TIMEOUT) == name, rescuer.log_tail()
        assert result.parent.get(timeout=TIMEOUT) == name, rescuer.log_tail()
    wanted = Counter([f"{name}{what}" for name in results for what in (": sent", ": chained")])

    def noted() -> Counter[str]:
        return Counter(entry.detail for entry in ledger.ends("told") if entry.detail)

    def unfinished() -> list[str]:
        statuses = (Status.PENDING, Status.PROCESSING)
        return [str(row) for status in statuses for row in app.queue_log.store.rows(RowFilter(status=status))]

    wait_until(
        lambda: noted() == wanted and not unfinished(),
        timeout=TIMEOUT,
        describe=lambda: (
            f"{wanted - noted()} missing, {noted() - wanted} too many, {unfinished()}\n{rescuer.log_tail()}"
        ),
    )
    assert len(steps) == len(results)
    return steps, list(results)


def assert_complete(steps: list[str], broker: Broker) -> None:
    """They are of every kind."""
    publishes = "AMQP publish" if broker.name.startswith("rabbitmq") else "Redis"
    for step in (
        "INSERT INTO effects",
        "INSERT INTO queue_log",
        "UPDATE queue_log",
        "COMMIT",
        publishes,
        "the acknowledgement",
    ):
        assert any(found.startswith(f"before {step}") for found in steps)
        assert any(found.startswith(f"after {step}") for found in steps)


@on_both_brokers
def test_a_kill_at_any_step_loses_and_doubles_nothing(
    kill_at_every_point: KillAtEveryStep, broker: Broker, effects: Effects
) -> None:
    steps, names = kill_at_every_point("atomic.order")
    assert effects.names() == sorted(names)
    assert_complete(steps, broker)


@pytest.mark.skipif("DJANGO_PYTHON" not in os.environ, reason="minutes for each database: `make test-django` runs it")
@pytest.mark.parametrize("orm", ["tests.support.orm"])
@pytest.mark.parametrize("broker", ["redis"], indirect=True)
def test_a_kill_at_any_step_of_a_body_with_djangos_orm(
    kill_at_every_point: KillAtEveryStep, broker: Broker, effects: Effects
) -> None:
    """On one broker: it does not see on whose connection the body writes."""
    steps, names = kill_at_every_point("atomic.order")
    assert effects.names() == sorted(names)
    assert_complete(steps, broker)


@on_both_brokers
@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_a_kill_doubles_the_effect_of_a_plain_task(
    kill_at_every_point: KillAtEveryStep, broker: Broker, effects: Effects
) -> None:
    """And what it sends, and what waits on it, is sent once all the same."""
    steps, names = kill_at_every_point("plain.order")
    assert_complete(steps, broker)
    had_effect = steps.index("after COMMIT")
    was_noted = next(
        place for place, step in enumerate(steps) if place > had_effect and step.startswith("after UPDATE queue_log")
    )
    doubled = [name for name in names if effects.count(name) == 2]
    assert doubled == names[had_effect:was_noted]
    assert effects.names() == sorted([*names, *doubled])
