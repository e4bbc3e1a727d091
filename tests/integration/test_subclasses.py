"""Classes derived by users, with hooks of their own, with and without ``super()``: guarded all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery.exceptions import TimeLimitExceeded

from celery_idempotent.core.records import ProcessedStatus, Status
from tests.support.apps.subclasses import HOOKS
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT, wait_until

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE

#: The hooks that a class has, in the order in which a successful run calls them.
CALLED_ON_SUCCESS = {
    "before_start": ["before_start"],
    "before_start.super": ["before_start"],
    "call": ["__call__"],
    "call.super": ["__call__"],
    "flask": ["push", "pop"],
    "hooks": ["on_success", "after_return"],
    "hooks.super": ["on_success", "after_return"],
    "everything": ["before_start", "__call__", "on_success", "after_return"],
    "flask.first": ["before_start", "push", "pop"],
    "flask.last": ["before_start", "push", "pop"],
    "mixin.first": ["before_start with its own", "__call__ with its own"],
    "mixin.last": ["before_start with its own", "__call__ with its own"],
    "wrapped": ["patched"],
    "replaced": ["patched"],
}
every_class = pytest.mark.parametrize("name", [*HOOKS, "request.first", "request.last", "class"])


def called(shared_worker: SharedWorker, task_id: str) -> list[str]:
    """Return the hooks that were called for a task, in order."""
    lines = Path(f"{shared_worker.ledger.path}.hooks").read_text().splitlines()
    return [line.split(maxsplit=2)[2] for line in lines if line.split()[1] == task_id]


@every_class
def test_a_message_and_its_copies_are_one_run(shared_worker: SharedWorker, name: str) -> None:
    task, m = f"sub.{name}", unique()

    first = shared_worker.task(task).apply_async(message_id=m)
    again = shared_worker.task(task).apply_async(message_id=m)
    assert first.get(timeout=TIMEOUT) == "success"
    redelivered = shared_worker.deliver(task, message_id=m, task_id=first.id)
    other = shared_worker.deliver(task, message_id=m)

    assert (again.id, again.duplicate) == (first.id, True)
    assert other.get(timeout=TIMEOUT) == "success"
    assert redelivered.get(timeout=TIMEOUT) == "success"
    shared_worker.assert_done(task, m, SUCCESS, starts=1, token=1, duplicates=3)


@every_class
def test_a_failure_is_recorded(shared_worker: SharedWorker, name: str) -> None:
    task, m = f"sub.{name}", unique()

    result = shared_worker.task(task).apply_async(("failure",), message_id=m)

    with pytest.raises(ValueError, match="as told"):
        result.get(timeout=TIMEOUT)
    row = shared_worker.row(task, m)
    assert (row.status, row.processed_status, row.error) == (Status.DONE, FAILURE, "ValueError: as told")


@every_class
def test_a_retry_is_a_second_run_of_one_row(shared_worker: SharedWorker, name: str) -> None:
    task, m = f"sub.{name}", unique()

    result = shared_worker.task(task).apply_async(("retry", shared_worker.path("flag")), message_id=m)

    assert result.get(timeout=TIMEOUT) == "retry"
    assert [start.retries for start in shared_worker.starts(task, m)] == [0, 1]
    row = shared_worker.row(task, m)
    assert (row.processed_status, row.attempt, row.token) == (SUCCESS, 1, 2)


@pytest.mark.parametrize("name", HOOKS)
def test_the_hooks_are_called_as_celery_calls_them(shared_worker: SharedWorker, name: str) -> None:
    result = shared_worker.task(f"sub.{name}").delay()
    assert result.get(timeout=TIMEOUT) == "success"

    expected = CALLED_ON_SUCCESS[name]
    wait_until(lambda: len(called(shared_worker, result.id)) >= len(expected), describe=f"the hooks {expected}")
    assert called(shared_worker, result.id) == expected


@pytest.mark.parametrize("name", ["call", "call.super", "flask", "everything", "flask.first", "mixin.last"])
def test_a_replay_does_not_enter_the_users_call(shared_worker: SharedWorker, name: str) -> None:
    task, m = f"sub.{name}", unique()
    assert shared_worker.task(task).apply_async(message_id=m).get(timeout=TIMEOUT) == "success"

    copy = shared_worker.deliver(task, message_id=m)

    assert copy.get(timeout=TIMEOUT) == "success"
    assert not {"__call__", "__call__ with its own", "push"} & set(called(shared_worker, copy.id))


@pytest.mark.parametrize("name", ["request.first", "request.last"])
def test_both_requests_learn_of_a_hard_limit(shared_worker: SharedWorker, name: str) -> None:
    task, m = f"sub.{name}", unique()

    result = shared_worker.task(task).apply_async(("hang",), message_id=m)

    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), TimeLimitExceeded)
    row = shared_worker.wait_until_done(task, m)
    assert (row.processed_status, row.token) == (FAILURE, 1)
    wait_until(lambda: called(shared_worker, result.id) == ["on_timeout"], describe="the user's on_timeout")
    assert len(shared_worker.starts(task, m)) == 1


def test_a_direct_call_goes_through_the_users_call_once(shared_worker: SharedWorker) -> None:
    for name in ("call", "call.super"):
        hooks = Path(f"{shared_worker.ledger.path}.hooks")
        before = hooks.read_text().count("None __call__") if hooks.exists() else 0

        assert shared_worker.task(f"sub.{name}")() == "success"

        assert hooks.read_text().count("None __call__") == before + 1
