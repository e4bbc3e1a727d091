"""The broker redelivers running messages, and workers die. A message runs again if it must, and never twice at once.

Redis has a visibility timeout of 2 s here. A redelivered copy there has the delivery tag of the running original, so that
acknowledging it deletes the broker's only copy. RabbitMQ delivers again at once when a worker's connection breaks.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.conftest import StartWorker
from tests.support.apps import AppSpec, OpenApp
from tests.support.brokers import Broker
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import wait_until

Base = Literal["idempotent", "plain"]

pytestmark = pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
on_redis = pytest.mark.parametrize("broker", ["redis"], indirect=True)
on_both = pytest.mark.parametrize("base", ["plain", "idempotent"])

#: Seconds until somebody may take over a dead worker's messages.
LEASE = 8.0


def impatient(spec: AppSpec, base: Base, *, lease: float = LEASE, **settings: Any) -> AppSpec:
    """Return an app whose broker delivers again after 2 s what is not acknowledged; each of its children has one message at a time."""
    return replace(
        spec,
        base=base,
        tasks=("tests.support.apps.scenarios",),
        ledger=f"{spec.ledger}.{base}",
        transport_options={
            **spec.transport_options,
            **({"visibility_timeout": 2} if spec.broker.startswith("redis") else {}),
        },
        settings={
            **spec.settings,
            "task_acks_late": True,
            "worker_prefetch_multiplier": 1,
            **({"idempotent_lease": lease} if base == "idempotent" else {}),
            **settings,
        },
    )


def times_ignored(shared_worker: SharedWorker, task_id: str) -> int:
    return shared_worker.worker.log.read_text().count(f"[{task_id}] ignored")


@on_redis
def test_visibility_timeout_2_s_a_6_s_task_acks_late_one_delay(
    spec: AppSpec, broker: Broker, open_app: OpenApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    key, gate = unique(), tmp_path / "gate"
    beside = replace(spec, queue=broker.other_queue("plain"))
    guarded, plain = (
        SharedWorker(spec, open_app(spec), start_worker(spec, concurrency=2, wait=False))
        for spec in (impatient(spec, "idempotent"), impatient(beside, "plain"))
    )
    for shared_worker in (guarded, plain):
        shared_worker.worker.wait_until_ready()

    result, double = (shared_worker.task("once").delay(key, str(gate)) for shared_worker in (guarded, plain))
    guarded.wait_for_starts_under(key, 1)
    plain.wait_for_starts_under(key, 2)
    # The copy comes back every second, and is held again while the owner lives.
    wait_until(lambda: times_ignored(guarded, result.id) >= 2, timeout=60, describe="the copy is held twice")
    (start,) = guarded.starts_under(key)
    wait_until(lambda: time.time() >= start.at + 6, describe="a run of 6 s")
    gate.touch()

    assert result.get(timeout=60).startswith(key)
    row = guarded.wait_until_done("once", result.id, duplicates=1)
    guarded.wait_until_idle()
    assert (len(guarded.starts_under(key)), len(guarded.ends_under(key))) == (1, 1)
    assert (row.processed_status, row.token) == ("success", 1)
    assert guarded.app.backend.client.hlen("unacked") == 0
    assert double.get(timeout=60)


@on_redis
@pytest.mark.parametrize("by", ["a-second-worker", "the-same-worker"])
def test_a_held_copy_runs_after_its_owner_is_killed(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, tmp_path: Path, by: str
) -> None:
    key, gate = unique(), tmp_path / "gate"
    spec = impatient(spec, "idempotent")
    app = open_app(spec)
    owner = start_worker(spec, concurrency=2 if by == "the-same-worker" else 1)
    shared_worker = SharedWorker(spec, app, owner)
    result = shared_worker.task("once").delay(key, str(gate))
    shared_worker.wait_for_starts_under(key, 1)
    holder = owner if by == "the-same-worker" else start_worker(spec)
    holder.wait_for_log(f"Task once[{result.id}] ignored", timeout=60)
    assert len(shared_worker.starts_under(key)) == 1

    owner.kill()
    gate.touch()
    if holder is owner:
        owner.start()

    assert result.get(timeout=90).startswith(key)
    replace(shared_worker, worker=holder).wait_until_idle()
    first, second = shared_worker.starts_under(key)
    (end,) = shared_worker.ends_under(key)
    assert (first.pid != second.pid, end.pid) == (True, second.pid)
    row = shared_worker.wait_until_done("once", result.id)
    assert (row.processed_status, row.token) == ("success", 2)


@on_redis
def test_an_ignored_copy_is_lost_with_its_killed_owner(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    """What lock packages do, on plain Celery: the message is lost."""
    key, gate = unique(), tmp_path / "gate"
    spec = impatient(spec, "plain")
    shared_worker = SharedWorker(spec, open_app(spec), start_worker(spec, concurrency=2))
    result = shared_worker.task("ignoring").delay(key, str(gate))
    shared_worker.wait_for_starts_under(key, 1)
    shared_worker.worker.wait_for_log(f"Task ignoring[{result.id}] ignored", timeout=60)
    broker = shared_worker.app.backend.client
    wait_until(lambda: broker.hlen("unacked") == 0, describe="the acknowledgement of the only copy")

    shared_worker.worker.kill()

    assert (broker.hlen("unacked"), broker.llen(shared_worker.spec.queue), shared_worker.ends_under(key)) == (0, 0, [])


@pytest.mark.parametrize(
    ("base", "broker"),
    [
        ("plain", "redis"),
        ("idempotent", "redis"),
        ("idempotent", "rabbitmq-classic"),
        ("idempotent", "rabbitmq-quorum"),
    ],
    indirect=["broker"],
)
def test_a_worker_is_killed_mid_task_then_the_same_call_again(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, tmp_path: Path, base: Base
) -> None:
    key, gate = unique(), tmp_path / "gate"
    spec = impatient(spec, base, lease=4.0)
    app = open_app(spec)
    workers = [start_worker(spec, wait=False) for _ in range(2)]
    for worker in workers:
        worker.wait_until_ready()
    shared_worker = SharedWorker(spec, app, workers[0])
    first = shared_worker.task("order").delay(key, str(gate))
    shared_worker.wait_for_starts_under(key, 1)
    (start,) = shared_worker.starts_under(key)
    owner, other = sorted(workers, key=lambda worker: worker.hostname != start.worker)

    owner.kill()
    again = shared_worker.task("order").delay(key, str(gate))
    gate.touch()

    values = {result.get(timeout=90) for result in (first, again)}
    replace(shared_worker, worker=other).wait_until_idle()
    starts, ends = len(shared_worker.starts_under(key)), len(shared_worker.ends_under(key))
    if base == "plain":
        assert (again.id == first.id, len(values), starts, ends) == (False, 2, 3, 2)
    else:
        assert (again.id == first.id, len(values), starts, ends) == (True, 1, 2, 1)
        assert again.duplicate
        assert shared_worker.wait_until_done("order", f"order:{key}").token == 2


@on_redis
@on_both
def test_a_worker_that_acknowledges_early_is_killed_mid_task(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, tmp_path: Path, base: Base
) -> None:
    key, gate = unique(), tmp_path / "gate"
    recovery = {"idempotent_on_abandoned": "rerun", "idempotent_recovery_interval": 1} if base == "idempotent" else {}
    spec = impatient(spec, base, lease=3.0, task_acks_late=False, **recovery)
    shared_worker = SharedWorker(spec, open_app(spec), start_worker(spec))
    result = shared_worker.task("order").delay(key, str(gate))
    shared_worker.wait_for_starts_under(key, 1)

    shared_worker.worker.kill()
    gate.touch()

    broker = shared_worker.app.backend.client
    assert (broker.hlen("unacked"), broker.llen(shared_worker.spec.queue)) == (0, 0)
    if base == "idempotent":
        shared_worker.worker.start()
        assert result.get(timeout=90).startswith(key)
        shared_worker.wait_until_idle()
        assert (len(shared_worker.starts_under(key)), len(shared_worker.ends_under(key))) == (2, 1)
        assert shared_worker.wait_until_done("order", f"order:{key}").processed_status == "success"


@on_redis
def test_a_child_is_killed_mid_task_with_reject_on_worker_lost(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    key, gate = unique(), tmp_path / "gate"
    # Nobody waits for this lease: the worker knows that its child died.
    spec = impatient(spec, "idempotent", lease=3600.0, task_reject_on_worker_lost=True)
    shared_worker = SharedWorker(spec, open_app(spec), start_worker(spec))
    first = shared_worker.task("order").delay(key, str(gate))
    shared_worker.wait_for_starts_under(key, 1)

    shared_worker.worker.kill_children()
    again = shared_worker.task("order").delay(key, str(gate))
    gate.touch()

    assert again.duplicate
    assert again.get(timeout=90) == first.get(timeout=90)
    shared_worker.wait_until_idle()
    assert (len(shared_worker.starts_under(key)), len(shared_worker.ends_under(key))) == (2, 1)
    assert shared_worker.wait_until_done("order", f"order:{key}").token == 2


@on_redis
def test_a_lease_shorter_than_the_run_while_the_owner_lives(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    key, gate = unique(), tmp_path / "gate"
    spec = impatient(spec, "idempotent", lease=3.0)
    shared_worker = SharedWorker(spec, open_app(spec), start_worker(spec, concurrency=2))
    result = shared_worker.task("once").delay(key, str(gate))
    shared_worker.wait_for_starts_under(key, 1)
    (start,) = shared_worker.starts_under(key)

    # Two leases and more, with a copy at the door every second.
    wait_until(lambda: time.time() >= start.at + 7, describe="a run of more than two leases")
    assert times_ignored(shared_worker, result.id) >= 2
    gate.touch()

    assert result.get(timeout=60).startswith(key)
    shared_worker.wait_until_idle()
    assert (len(shared_worker.starts_under(key)), len(shared_worker.ends_under(key))) == (1, 1)
    assert shared_worker.wait_until_done("once", result.id).token == 1


@on_redis
@on_both
def test_a_lease_shorter_than_the_run_of_an_owner_that_hangs(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, tmp_path: Path, base: Base
) -> None:
    """Stopped past its lease, the owner wakes up after its successor has finished: its own end counts for nothing."""
    key, after, gate = unique(), unique("after"), tmp_path / "gate"
    spec = impatient(spec, base, lease=3.0)
    app = open_app(spec)
    owner = start_worker(spec)
    shared_worker = SharedWorker(spec, app, owner)
    result = shared_worker.task("once").apply_async((key, str(gate)), link=shared_worker.task("receive").s(after))
    shared_worker.wait_for_starts_under(key, 1)

    owner.pause()
    gate.touch()
    successor = start_worker(spec)
    value = result.get(timeout=90)
    assert successor.hostname in value
    shared_worker.wait_for_starts_under(after, 1)
    owner.resume()
    wait_until(lambda: len(shared_worker.ends_under(key)) == 2, timeout=60, describe=owner.log_tail)
    owner.wait_for_log(f"Task once[{result.id}] {'succeeded' if base == 'plain' else 'ignored'}", timeout=60)

    shared_worker.wait_until_idle(successor)
    assert len(shared_worker.starts_under(key)) == 2
    # A result that is there already is not overwritten by Redis's backend; what waits on it is sent again all the same.
    assert app.AsyncResult(result.id).get(timeout=60) == value
    if base == "plain":
        assert len(shared_worker.starts_under(after)) == 2
    else:
        assert len(shared_worker.starts_under(after)) == 1
        assert shared_worker.wait_until_done("once", result.id).token == 2
        assert f"the claim on message '{result.id}' (token 1) was lost" in owner.log.read_text()
