"""``forget`` frees an id, and keeps what still runs of its message fenced."""

from __future__ import annotations

from pathlib import Path

import pytest

from celery_idempotent import MessageMismatchError
from celery_idempotent.core.records import FORGOTTEN, MessageKey, NewMessage, ProcessedStatus, Status
from tests.integration.cli.conftest import Command
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT


def forgotten(command: Command, *arguments: str) -> list[str]:
    status, said = command("forget", *arguments, "--yes")
    assert (status, said["refused"], said["missing"]) == (0, [], [])
    return [one["message_id"] for one in said["forgotten"]]


def test_the_next_message_under_the_id_is_new(shared_worker: SharedWorker, command: Command) -> None:
    m, echo = unique(), shared_worker.task("echo")
    first = echo.apply_async(("one",), message_id=m)
    assert first.get(timeout=TIMEOUT) == "one"
    shared_worker.wait_until_done("echo", m)
    with pytest.raises(MessageMismatchError):
        echo.apply_async(("two",), message_id=m)

    assert forgotten(command, m) == [m]

    row = shared_worker.row("echo", m)
    assert (row.message, row.result, row.fingerprint, row.error) == (None, None, None, FORGOTTEN)
    second = echo.apply_async(("two",), message_id=m)
    assert not second.duplicate
    assert second.get(timeout=TIMEOUT) == "two"
    assert len(shared_worker.starts("echo", m)) == 2


def test_an_unfinished_message_is_forgotten_by_force_only(shared_worker: SharedWorker, command: Command) -> None:
    waits, runs, gate = unique("waits"), unique("runs"), shared_worker.path("gate")
    shared_worker.task("echo").apply_async(("value",), message_id=waits, queue=unique("queue"))
    shared_worker.task("gated").apply_async((gate, "old"), message_id=runs)
    shared_worker.wait_for_starts("gated", runs)

    status, said = command("forget", waits, runs, "never", "--yes")

    assert (status, said["forgotten"], said["missing"]) == (1, [], ["no message 'never'"])
    reasons = {one["message_id"]: one["reason"] for one in said["refused"]}
    assert reasons == {waits: "it waits to run; see --force", runs: "it runs; see --force"}
    assert (shared_worker.row("echo", waits).status, shared_worker.row("gated", runs).status) == (
        Status.PENDING,
        Status.PROCESSING,
    )

    assert forgotten(command, waits, runs, "--force") == [waits, runs]
    new = shared_worker.task("gated").apply_async((gate, "new"), message_id=runs)
    shared_worker.wait_for_starts("gated", runs, 2)
    Path(gate).touch()

    assert new.get(timeout=TIMEOUT) == "new"
    shared_worker.worker.wait_for_log(f"the claim on message {runs!r} (token 1) was lost")
    row = shared_worker.wait_until_done("gated", runs)
    assert (row.processed_status, row.task_id, row.token) == (ProcessedStatus.SUCCESS, new.id, 2)


def test_many_are_chosen_once(shared_worker: SharedWorker, command: Command) -> None:
    mark = unique("many")
    ids = [f"{mark}:{number}" for number in range(3)]
    for m in ids:
        shared_worker.task("fail").apply_async((f"no {m}",), message_id=m)
        shared_worker.wait_until_done("fail", m)
    choice = ("--message-id", f"{mark}:*", "--error", "ValueError: no *", "--status", "done")

    status, would = command("forget", *choice, "--dry-run")
    assert (status, would["dry_run"], len(would["forgotten"])) == (0, True, 3)
    assert shared_worker.row("fail", ids[0]).error != FORGOTTEN

    assert forgotten(command, *choice, "--limit", "2") == ids[:2]
    assert forgotten(command, "--message-id", f"{mark}:*") == ids[2:]
    assert forgotten(command, "--message-id", f"{mark}:*") == []
    status, said = command("requeue", "--message-id", f"{mark}:*", "--yes")
    assert (status, said["requeued"], said["refused"]) == (0, [], [])


def test_a_message_whose_worker_died_is_forgotten(shared_worker: SharedWorker, command: Command) -> None:
    m, store = unique(), shared_worker.app.queue_log.store
    lost = store.claim(NewMessage(MessageKey(m, "echo"), m), worker="w:1", lease=60.0, grace=0.0)
    store.expire(lost.claim)

    assert forgotten(command, m) == [m]

    assert not store.complete(lost.claim, result=b"late")
