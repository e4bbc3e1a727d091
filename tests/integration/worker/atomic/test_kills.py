"""A worker that is killed at any step of a task, which sends a message and is part of a chain.

Of an atomic task nothing is lost or doubled. Of a plain one the effect of its body is doubled in one window, and nothing else.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from celery import chain

from celery_idempotent.core.records import RowFilter, Status
from tests.support.apps import AppSpec, OpenApp
from tests.support.brokers import Broker
from tests.support.effects import Effects
from tests.support.kill_points import KILL_PLACES, Victim, work
from tests.support.ledger import Ledger
from tests.support.waiting import wait_until
from tests.support.worker import StartWorker

TIMEOUT = 120.0

#: Seconds.
LEASE = 2.0

pytestmark = pytest.mark.timeout(1200)

in_each_place = pytest.mark.parametrize(("store_url", "broker"), KILL_PLACES, indirect=True)

#: A step, and how often it was reached.
Step = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Killed:
    """A worker that died, or came to its end.

    Attributes:
        name: Of the order that was its message.
        step: The step at which it died, or ``survived``.
        reached: All steps that it has reached.
    """

    name: str
    step: str
    reached: tuple[str, ...]

    def steps(self) -> list[Step]:
        """Return what it has reached, each with how often it had been there by then."""
        return [(step, self.reached[:number].count(step)) for number, step in enumerate(self.reached, 1)]

    @property
    def leaves_its_effect_unknown(self) -> bool:
        """Whether the body has had its effect, and the row does not say so yet."""
        behind = self.reached[self.reached.index("after COMMIT") :] if "after COMMIT" in self.reached else ()
        return bool(behind) and not any(step.startswith("after UPDATE queue_log") for step in behind)


#: Kills a worker at each step of a task, and has what they leave done.
KillAtEveryStep = Callable[[str], list[Killed]]


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
    def kill_at_every_point(task: str) -> list[Killed]:
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
) -> list[Killed]:
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
    killed: list[Killed] = []
    died_at: set[Step] = set()
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
        step = path.read_text().strip().partition(" ")[2]
        killed.append(Killed(name, step, tuple(Path(f"{path}.reached").read_text().splitlines())))
        if not survived:
            *earlier, at = killed[-1].steps()
            died_at.add(at)
            if set(earlier[-1:]) <= died_at:
                last += 1
            else:
                # It has had fewer steps than another, which looked for messages meanwhile, and so has left one out.
                died_at.add(earlier[-1])  # or nearly so: it is tried once
                last -= 1
        elif {"before the acknowledgement", "after the acknowledgement"} <= {each.step for each in killed}:
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
    assert [each.name for each in killed] == list(results)
    return killed


def assert_complete(killed: list[Killed], broker: Broker) -> None:
    """Some have died at a step of every kind."""
    publishes = "AMQP publish" if broker.name.startswith("rabbitmq") else "Redis"
    for step in (
        "INSERT INTO effects",
        "INSERT INTO queue_log",
        "UPDATE queue_log",
        "COMMIT",
        publishes,
        "the acknowledgement",
    ):
        assert any(each.step.startswith(f"before {step}") for each in killed)
        assert any(each.step.startswith(f"after {step}") for each in killed)


@in_each_place
def test_a_kill_at_any_step_loses_and_doubles_nothing(
    kill_at_every_point: KillAtEveryStep, broker: Broker, effects: Effects
) -> None:
    killed = kill_at_every_point("atomic.order")
    assert effects.names() == sorted(each.name for each in killed)
    assert_complete(killed, broker)


@pytest.mark.skipif("DJANGO_PYTHON" not in os.environ, reason="minutes for each database: `make test-django` runs it")
@pytest.mark.parametrize("orm", ["tests.support.orm"])
@pytest.mark.parametrize("broker", ["redis"], indirect=True)
def test_a_kill_at_any_step_of_a_body_with_djangos_orm(
    kill_at_every_point: KillAtEveryStep, broker: Broker, effects: Effects
) -> None:
    """On one broker: it does not see on whose connection the body writes."""
    killed = kill_at_every_point("atomic.order")
    assert effects.names() == sorted(each.name for each in killed)
    assert_complete(killed, broker)


@pytest.mark.parametrize(
    ("store_url", "broker"), [place for place in KILL_PLACES if place[0] == "postgresql"], indirect=True
)
def test_a_kill_doubles_the_effect_of_a_plain_task(
    kill_at_every_point: KillAtEveryStep, broker: Broker, effects: Effects
) -> None:
    """And what it sends, and what waits on it, is sent once all the same."""
    killed = kill_at_every_point("plain.order")
    assert_complete(killed, broker)
    # By what each has reached: two that die at the same number need not have done the same.
    doubled = [each.name for each in killed if each.leaves_its_effect_unknown]
    assert doubled
    assert effects.names() == sorted([*(each.name for each in killed), *doubled])
