"""What a caller may do, and what may happen to a message before it starts. A message that never ran refuses no later call."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
from celery.exceptions import TaskRevokedError
from kombu.exceptions import EncodeError, OperationalError

from celery_idempotent import AlreadyFailedError
from tests.support.apps import OpenApp
from tests.support.deployment import unique
from tests.support.servers.private import free_port
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import wait_until


@dataclass
class Unsent:
    """An argument that has a canonical form, and that JSON cannot take."""

    text: str = ""


pytestmark = pytest.mark.parametrize("both_workers", ["redis"], indirect=True)


def test_publish_fails_after_the_id_was_taken(guarded: SharedWorker, open_app: OpenApp) -> None:
    key = unique()
    nowhere = open_app(replace(guarded.spec, broker=f"redis://127.0.0.1:{free_port()}/0"))

    with pytest.raises(OperationalError):
        nowhere.tasks["order"].delay(key)
    with pytest.raises(EncodeError):
        guarded.task("once").apply_async((key, Unsent()), message_id=key)

    assert guarded.find("order", f"order:{key}") is None
    assert guarded.find("once", key) is None
    first, second = guarded.task("order").delay(key), guarded.task("once").apply_async((key,), message_id=key)
    assert (first.duplicate, second.duplicate) == (False, False)
    assert all(result.get(timeout=60) for result in (first, second))
    assert len(guarded.starts_under(key)) == 2


def test_keyword_or_positional_and_defaults_are_one_call(guarded: SharedWorker, plain: SharedWorker) -> None:
    key = unique()
    one_call = [((key,), {}), ((), {"key": key}), ((key, 1), {}), ((key,), {"currency": "EUR", "amount": 1})]

    results = [guarded.task("priced").apply_async(args, kwargs) for args, kwargs in one_call]
    doubles = [plain.task("priced").apply_async(args, kwargs) for args, kwargs in one_call]

    assert len({result.get(timeout=60) for result in results}) == 1
    assert [result.duplicate for result in results] == [False, True, True, True]
    guarded.wait_until_idle()
    assert len(guarded.starts_under(key)) == 1
    assert len({double.get(timeout=60) for double in doubles}) == 4


def test_different_calls_are_not_one(guarded: SharedWorker) -> None:
    key = unique()
    amounts = [1, "1", 2, True, None, [1, 2], "[1, 2]", {"a": 1}]

    results = [guarded.task("priced").delay(key, amount) for amount in amounts]
    results.append(guarded.task("priced").delay(key, currency="USD"))

    assert [result.duplicate for result in results] == [False] * 9
    assert len({result.get(timeout=60) for result in results}) == 9


def test_revoked_before_start(guarded: SharedWorker) -> None:
    key, task_id = unique(), str(uuid.uuid4())
    order = guarded.task("order_again")
    guarded.app.control.revoke(task_id, reply=True, limit=1, timeout=30, destination=[guarded.worker.hostname])

    revoked = order.apply_async((key,), task_id=task_id)
    with pytest.raises(TaskRevokedError):
        revoked.get(timeout=60)
    row = guarded.wait_until_done("order_again", f"order:{key}")

    assert (row.processed_status, row.error, row.token) == ("failure", "revoked", 0)
    again = order.delay(key)
    assert not again.duplicate
    assert again.get(timeout=60).startswith(key)
    assert len(guarded.starts_under(key)) == 1


def test_expired_before_start(guarded: SharedWorker) -> None:
    key = unique()
    order = guarded.task("order_again")
    due = datetime.now(UTC) + timedelta(seconds=1)
    expired, message = guarded.copies(lambda queue: order.apply_async((key,), expires=due, queue=queue))
    wait_until(lambda: datetime.now(UTC) > due, describe="the expiry")
    guarded.put(message)

    with pytest.raises(TaskRevokedError):
        expired.get(timeout=60)
    row = guarded.wait_until_done("order_again", f"order:{key}")
    assert (row.processed_status, row.token) == ("failure", 0)
    assert "expired" in (row.error or "")
    again = order.delay(key)
    assert not again.duplicate
    assert again.get(timeout=60).startswith(key)
    assert len(guarded.starts_under(key)) == 1


def test_purged_before_start(guarded: SharedWorker, open_app: OpenApp) -> None:
    key = unique()
    # A caller that doubts the publication of a message that has waited for a second.
    doubtful = open_app(replace(guarded.spec, settings={**guarded.spec.settings, "idempotent_lost_after": 1.0})).tasks[
        "order"
    ]
    purged, _ = guarded.copies(lambda queue: doubtful.apply_async((key,), queue=queue))

    wait_until(lambda: doubtful.delay(key) and guarded.starts_under(key), describe="a run", interval=0.2, timeout=60)

    assert purged.get(timeout=60).startswith(key)
    guarded.wait_until_done("order", f"order:{key}")
    guarded.wait_until_idle()
    assert len(guarded.starts_under(key)) == 1


def test_an_exception_that_cannot_be_rebuilt(guarded: SharedWorker) -> None:
    key = unique()
    failed = guarded.task("brittle").delay(key)

    error = failed.get(timeout=60, propagate=False)

    assert "7: cannot be rebuilt" in str(error)
    row = guarded.wait_until_done("brittle", f"brittle:{key}")
    assert row.processed_status == "failure"
    assert row.error is not None
    assert row.error.endswith("UnbuildableError: 7: cannot be rebuilt")
    # A caller waiting under another task id gets an error that can be rebuilt. The worker goes on.
    other = guarded.app.send_task("brittle", (key,), message_id=f"brittle:{key}")
    with pytest.raises(AlreadyFailedError, match="7: cannot be rebuilt"):
        other.get(timeout=60)
    guarded.wait_until_idle()
    assert len(guarded.starts_under(key)) == 1
