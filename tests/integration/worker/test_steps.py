"""The steps of a body whose worker is killed before, inside and after each of them; and those of retries and replacements."""

from __future__ import annotations

import pytest
from celery import chain

from celery_idempotent.core.records import Claim, ProcessedStatus, Status
from tests.support.apps.stepping import POINTS
from tests.support.deployment import unique
from tests.support.provider import Provider
from tests.support.servers import skip_if_not_installed
from tests.support.shared_workers import SharedWorker, open_shared_worker
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import Pool

LINES = [f"line {number}" for number in range(5)]
DEATHS = [f"{point} {number}" for number in range(5) for point in POINTS]


@pytest.mark.parametrize("task", ["steps.five", "steps.atomic"])
def test_a_kill_at_any_step_charges_once_where_keys_are_honoured(shared_worker: SharedWorker, task: str) -> None:
    """Before, inside and after each of five steps; the result is the same as without a kill, and what waits on it goes on."""
    directories = {dies: shared_worker.path("provider") for dies in ("never", *DEATHS)}
    providers = {dies: Provider(directory) for dies, directory in directories.items()}
    generic = shared_worker.task("told")
    results = {
        dies: chain(shared_worker.task(task).s(directory, dies).set(message_id=unique()), generic.s()).delay()
        for dies, directory in directories.items()
    }

    for dies, result in results.items():
        charges = result.parent.get(timeout=TIMEOUT)
        assert charges == providers[dies].charges(), dies
        assert [charge["what"] for charge in charges] == LINES, dies
        result.get(timeout=TIMEOUT)
        starts = shared_worker.ledger.starts(task, task_id=result.parent.id)
        assert len(starts) == (1 if dies == "never" else 2), dies
        requests = providers[dies].requests()
        if task == "steps.five":
            # One step at most is called again: that inside of which it died.
            point, _, number = dies.partition(" ")
            assert requests == sorted(LINES + ([f"line {number}"] if point == "inside" else [])), dies


def test_a_kill_inside_of_a_step_charges_twice_where_keys_are_not_honoured(shared_worker: SharedWorker) -> None:
    """And a kill between steps does not."""
    directories = {dies: shared_worker.path("provider") for dies in ("before 2", "inside 2", "after 2")}
    results = [
        shared_worker.task("steps.five").apply_async((directory, dies, False), message_id=unique())
        for dies, directory in directories.items()
    ]
    for result in results:
        assert len(result.get(timeout=TIMEOUT)) == 5
    charged = {dies: Provider(directory).charged() for dies, directory in directories.items()}
    assert charged == {"before 2": LINES, "inside 2": sorted([*LINES, "line 2"]), "after 2": LINES}


def test_retries_have_the_steps_of_the_attempts_before(shared_worker: SharedWorker) -> None:
    m, directory = unique(), shared_worker.path("provider")
    charge = shared_worker.send("steps.retried", directory, message_id=m).get(timeout=TIMEOUT)
    assert Provider(directory).charges() == [charge]
    assert len(shared_worker.starts("steps.retried", m)) == 3
    row = shared_worker.wait_until_done("steps.retried", m)
    assert (row.steps, row.processed_status) == (None, ProcessedStatus.SUCCESS)


def test_a_task_that_replaces_itself_takes_other_steps(shared_worker: SharedWorker) -> None:
    directory = shared_worker.path("provider")
    last = shared_worker.send("steps.pages", directory, 0, message_id=unique()).get(timeout=TIMEOUT)
    assert last["what"] == "page 2"
    assert Provider(directory).charged() == ["page 0", "page 1", "page 2"]


def test_an_owner_that_lost_its_claim_takes_no_other_step(shared_worker: SharedWorker) -> None:
    """It is stopped at its next step, and the new owner has the steps that it kept."""
    m, directory, gate = unique(), shared_worker.path("provider"), shared_worker.gate()
    provider, store = Provider(directory), shared_worker.app.queue_log.store
    shared_worker.send("steps.gated", directory, str(gate), message_id=m)
    wait_until(lambda: provider.requests() == ["first"], describe="the first step")
    row = shared_worker.wait_for_row("steps.gated", m, lambda row: row.steps is not None)
    assert store.expire(Claim(row.key, row.token))
    taken = store.take_over(row, task_id="other", worker="other@test:1", lease=60.0, attempt=0)
    assert taken is not None
    gate.touch()
    shared_worker.worker.wait_for_log(f"the claim on message {m!r} (token {row.token}) was lost")
    found = shared_worker.row("steps.gated", m)
    assert (found.status, found.steps, found.worker) == (Status.PROCESSING, row.steps, "other@test:1")
    assert provider.requests() == ["first"]
    assert store.fail(taken.claim, error="ended by the test")


def test_a_soft_limit_strikes_in_a_step(shared_worker: SharedWorker) -> None:
    directory = shared_worker.path("provider")
    assert shared_worker.send("steps.limited", directory, message_id=unique()).get(timeout=TIMEOUT) == "limited"


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_steps_in_other_pools(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> None:
    """Bodies that run at once, in threads or greenlets of one process, take steps of their own."""
    tasks = ("tests.support.apps.generic", "tests.support.apps.stepping")
    directory = tmp_path_factory.mktemp(pool)
    with skip_if_not_installed(), open_shared_worker(directory, tasks, pool=pool) as worker:
        directories = [worker.path("provider") for _ in range(6)]
        results = [worker.send("steps.five", path, "never", message_id=unique()) for path in directories]
        results += [worker.send("steps.retried", path, message_id=unique()) for path in directories]
        for path, five, retried in zip(directories, results, results[6:], strict=False):
            charges = [*five.get(timeout=TIMEOUT), retried.get(timeout=TIMEOUT)]
            assert charges == Provider(path).charges()
            assert sorted(Provider(path).requests()) == [*LINES, "retried"]
