"""``requeue``: a failed message runs again, and stays one message."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery import chain, chord
from celery.result import AsyncResult

from celery_idempotent.core.records import MessageKey, NewMessage, ProcessedStatus, Row, RowFilter, Status
from celery_idempotent.maintenance.requeue import NotRequeued, requeue
from celery_idempotent.message.serialization import encode_message
from celery_idempotent.producer.relay import relay
from tests.integration.cli.conftest import Command
from tests.integration.worker.test_copies import consumed
from tests.integration.worker.test_revoke_and_expiry import revoke
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT, wait_until

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE


def requeued(command: Command, *arguments: str) -> list[dict[str, str]]:
    status, said = command("requeue", *arguments, "--yes")
    assert (status, said["refused"], said["missing"]) == (0, [], [])
    found: list[dict[str, str]] = said["requeued"]
    return found


def again(result: AsyncResult) -> AsyncResult:
    """Return the result as another process sees it: this one keeps the failure that it has seen."""
    return AsyncResult(result.id, app=result.app)


def get(result: AsyncResult) -> object:
    """Wait for the value to replace the failure."""
    wait_until(lambda: again(result).successful(), describe=lambda: again(result).state)
    return again(result).get(timeout=TIMEOUT)


def failed(shared_worker: SharedWorker, task: str, message_id: str) -> Row:
    row = shared_worker.wait_until_done(task, message_id)
    assert row.processed_status is FAILURE
    return row


def test_a_failed_message_runs_again_under_the_ids_that_it_had(shared_worker: SharedWorker, command: Command) -> None:
    m = unique()
    result = shared_worker.task("flaky").apply_async((m, shared_worker.path("flag")), message_id=m)
    with pytest.raises(ValueError, match="the first time"):
        result.get(timeout=TIMEOUT)
    before = failed(shared_worker, "flaky", m)

    assert requeued(command, m) == [{"message_id": m, "task_name": "flaky", "task_id": result.id}]

    assert get(result) == m
    after = shared_worker.wait_until_done("flaky", m)
    assert (after.processed_status, after.task_id, after.token) == (SUCCESS, result.id, before.token + 1)
    assert (after.created_timestamp, after.error, after.duplicates) == (before.created_timestamp, None, 0)
    assert len(shared_worker.starts("flaky", m)) == 2


def test_a_requeued_message_has_all_its_retries_again(shared_worker: SharedWorker, command: Command) -> None:
    m = unique()
    result = shared_worker.task("give_up").apply_async((True,), message_id=m)
    assert failed(shared_worker, "give_up", m).attempt == 2
    with pytest.raises(ValueError, match="no use"):
        result.get(timeout=TIMEOUT)

    requeued(command, m)

    shared_worker.wait_for_starts("give_up", m, 6)
    assert failed(shared_worker, "give_up", m).attempt == 2
    assert [start.retries for start in shared_worker.starts("give_up", m)] == [0, 1, 2, 0, 1, 2]


def test_the_rest_of_a_chain_goes_on(shared_worker: SharedWorker, command: Command) -> None:
    m = unique()
    first = shared_worker.task("flaky").s("value", shared_worker.path("flag")).set(message_id=m)
    last = chain(
        first, shared_worker.task("echo").s(), shared_worker.task("told").s("behind"), app=shared_worker.app
    ).apply_async()
    with pytest.raises(ValueError, match="the first time"):
        last.get(timeout=TIMEOUT)
    failed(shared_worker, "flaky", m)

    requeued(command, m)

    assert get(last) == ["value", "behind"]
    assert get(last.parent) == "value"


def test_links_are_sent_and_errbacks_are_not_sent_twice(shared_worker: SharedWorker, command: Command) -> None:
    m = unique()
    result = shared_worker.task("flaky").apply_async(
        (m, shared_worker.path("flag")),
        message_id=m,
        link=shared_worker.task("told").s("linked"),
        link_error=shared_worker.task("errback").s(),
    )
    shared_worker.wait_for_note("errback", result.id)

    requeued(command, m)

    assert get(result) == m
    wait_until(
        lambda: any(note.task == "told" for note in shared_worker.ledger.starts("told")),
        describe="the link",
    )
    assert [note.detail for note in shared_worker.ledger.entries(task="errback")].count(result.id) == 1


def test_calls_of_the_body_are_not_made_twice(shared_worker: SharedWorker, command: Command) -> None:
    m = unique()
    result = shared_worker.task("flaky.parent").apply_async((m, shared_worker.path("flag")), message_id=m)
    failed(shared_worker, "flaky.parent", m)
    shared_worker.wait_for_note("child", f"{m}:1")

    requeued(command, m)

    children = get(result)
    assert isinstance(children, list)
    assert [AsyncResult(child, app=shared_worker.app).get(timeout=TIMEOUT) for child in children] == [
        f"{m}:1",
        f"{m}:2",
    ]
    noted = [note.detail for note in shared_worker.ledger.entries(task="child")]
    assert [noted.count(f"{m}:{number}") for number in (1, 2)] == [1, 1]


def test_a_body_that_lost_a_worker_makes_no_call_twice(shared_worker: SharedWorker, command: Command) -> None:
    """Its message says that a retry was for the loss; the requeued one is no retry."""
    m = unique()
    result = shared_worker.task("flaky.lost").apply_async(
        (m, shared_worker.path("killed"), shared_worker.path("flag")), message_id=m
    )
    assert failed(shared_worker, "flaky.lost", m).attempt == 1

    requeued(command, m)

    assert get(result) == m
    assert [note.detail for note in shared_worker.ledger.entries(task="child")].count(f"{m}:lost") == 1


@pytest.mark.parametrize("dies_again", [False, True], ids=["once", "twice"])
def test_calls_of_a_body_that_was_terminated_are_not_made_twice(
    shared_worker: SharedWorker, command: Command, dies_again: bool
) -> None:
    """It goes on under a new task id, and is taken over under that when its worker dies as well."""
    m, killed = unique(), shared_worker.path("killed")
    if not dies_again:
        Path(killed).touch()
    result = shared_worker.task("flaky.stuck").apply_async((m, shared_worker.path("flag"), killed), message_id=m)
    shared_worker.wait_for_note("child", f"{m}:stuck")
    revoke(shared_worker, result.id, terminate=True, signal="SIGKILL")
    assert str(failed(shared_worker, "flaky.stuck", m).error).startswith("revoked")

    (one,) = requeued(command, m)

    assert one["task_id"] != result.id
    assert AsyncResult(one["task_id"], app=shared_worker.app).get(timeout=TIMEOUT) == m
    assert shared_worker.wait_until_done("flaky.stuck", m).token == (3 if dies_again else 2)
    calls = [
        note.detail for note in shared_worker.ledger.entries(task="flaky.stuck") if note.detail and note.message_id == m
    ]
    assert len(calls) == len(shared_worker.starts("flaky.stuck", m)) == (3 if dies_again else 2)
    assert len(set(calls)) == 1, "each time it is one and the same call"
    assert [note.detail for note in shared_worker.ledger.entries(task="child")].count(f"{m}:stuck") == 1


def test_an_abandoned_message_runs_again(shared_worker: SharedWorker, command: Command) -> None:
    m = unique()
    result = shared_worker.task("die.early").apply_async((shared_worker.path("flag"),), message_id=m)
    assert str(failed(shared_worker, "die.early", m).error).startswith("abandoned")

    requeued(command, "--error", "abandoned*", "--message-id", m)

    assert get(result) == "survived"
    assert shared_worker.wait_until_done("die.early", m).processed_status is SUCCESS


def test_a_revoked_message_runs_under_a_new_task_id(shared_worker: SharedWorker, command: Command) -> None:
    m = unique()
    result = shared_worker.task("echo").apply_async(("late",), message_id=m, countdown=3600)
    shared_worker.app.control.revoke(result.id)
    shared_worker.deliver("echo", ("late",), message_id=m, task_id=result.id)
    assert failed(shared_worker, "echo", m).error == "revoked"

    (one,) = requeued(command, m)

    assert one["task_id"] != result.id
    assert AsyncResult(one["task_id"], app=shared_worker.app).get(timeout=TIMEOUT) == "late"
    assert shared_worker.wait_until_done("echo", m).task_id == one["task_id"]


def test_an_expired_message_runs_without_its_expiry_under_a_new_task_id(
    shared_worker: SharedWorker, command: Command
) -> None:
    m, queue = unique(), unique("queue")
    result = shared_worker.task("echo").apply_async(("stale",), message_id=m, expires=0.2, queue=queue)
    wait_until(
        lambda: (
            (shared_worker.row("echo", m).read_at - shared_worker.row("echo", m).created_timestamp).total_seconds()
            > 0.5
        ),
        describe="its expiry",
    )
    with consumed(shared_worker, queue):
        assert str(failed(shared_worker, "echo", m).error).startswith("expired")
        (one,) = requeued(command, m)
        assert one["task_id"] != result.id
        assert AsyncResult(one["task_id"], app=shared_worker.app).get(timeout=TIMEOUT) == "stale"
    assert shared_worker.wait_until_done("echo", m).processed_status is SUCCESS


def test_many_are_chosen_by_what_they_failed_with(shared_worker: SharedWorker, command: Command) -> None:
    mark = unique("outage")
    ids = [f"{mark}:{number}" for number in range(3)]
    results = [shared_worker.task("flaky").apply_async((m, shared_worker.path("flag")), message_id=m) for m in ids]
    other = f"{mark}:other"
    shared_worker.task("fail").apply_async((mark,), message_id=other)
    for m in ids:
        failed(shared_worker, "flaky", m)
    failed(shared_worker, "fail", other)
    choice = ("--message-id", f"{mark}:*", "--error", "ValueError: the first time*", "--newer-than", "1h")

    status, would = command("requeue", *choice, "--dry-run")
    assert (status, would["dry_run"], [one["message_id"] for one in would["requeued"]]) == (0, True, ids)
    assert failed(shared_worker, "flaky", ids[0]).token == 1

    assert [one["message_id"] for one in requeued(command, *choice, "--limit", "2")] == ids[:2]
    assert [one["message_id"] for one in requeued(command, *choice)] == ids[2:]
    assert [get(result) for result in results] == ids
    assert failed(shared_worker, "fail", other).token == 1


def test_a_failed_chord_stays_failed_until_it_is_resent(shared_worker: SharedWorker, command: Command) -> None:
    """Its body is not sent any more. For a new chord, members that are done are replayed."""
    m, flag = unique(), shared_worker.path("flag")

    def send() -> AsyncResult:
        header = [
            shared_worker.task("flaky").s("flaky", flag).set(message_id=m),
            shared_worker.task("echo").s("other").set(message_id=f"{m}:other"),
        ]
        return chord(header, shared_worker.task("echo").s(), app=shared_worker.app).apply_async()

    body = send()
    with pytest.raises(Exception, match="the first time"):
        body.get(timeout=TIMEOUT)
    failed(shared_worker, "flaky", m)

    requeued(command, m)

    shared_worker.wait_for_row("flaky", m, lambda row: row.processed_status is SUCCESS)
    assert again(body).failed()
    assert sorted(send().get(timeout=TIMEOUT)) == ["flaky", "other"]
    assert len(shared_worker.starts("echo", f"{m}:other")) == 1
    assert len(shared_worker.starts("flaky", m)) == 2


# -- what is refused -----------------------------------------------------------------------------------------------------------


def test_a_message_that_has_not_failed_is_not_requeued(shared_worker: SharedWorker, command: Command) -> None:
    done, waits, runs, dead = (unique(what) for what in ("done", "waits", "runs", "dead"))
    shared_worker.task("echo").apply_async((1,), message_id=done).get(timeout=TIMEOUT)
    shared_worker.task("echo").apply_async((1,), message_id=waits, queue=unique("queue"))
    gate = shared_worker.path("gate")
    result = shared_worker.task("gated").apply_async((gate,), message_id=runs)
    shared_worker.wait_for_starts("gated", runs)
    store = shared_worker.app.queue_log.store
    lost = store.claim(NewMessage(MessageKey(dead, "echo"), dead), worker="w:1", lease=60.0, grace=0.0)
    store.expire(lost.claim)

    status, said = command("requeue", done, waits, runs, dead, "never", "--yes")

    assert (status, said["requeued"], said["missing"]) == (1, [], ["no message 'never'"])
    reasons = {one["message_id"]: one["reason"] for one in said["refused"]}
    assert reasons[done].startswith("it succeeded")
    assert reasons[waits].startswith("it already waits")
    assert reasons[runs].startswith("it is running on ")
    assert reasons[dead] == "its row no longer has a message"
    assert [shared_worker.row("echo", m).token for m in (done, waits, dead)] == [1, 0, 1]
    shared_worker.app.queue_log.store.fail(lost.claim, error="over")
    Path(gate).touch()
    result.get(timeout=TIMEOUT)


def test_a_message_whose_worker_died_runs_again(shared_worker: SharedWorker, command: Command) -> None:
    m, store = unique(), shared_worker.app.queue_log.store
    message = encode_message(("value",), {}, {}, serializer="json")
    lost = store.claim(NewMessage(MessageKey(m, "echo"), m, message=message), worker="w:1", lease=60.0, grace=0.0)
    assert command("requeue", m, "--yes")[0] == 1
    store.expire(lost.claim)

    requeued(command, m)

    row = shared_worker.wait_for_row("echo", m, lambda row: row.status is Status.DONE)
    assert (row.processed_status, row.token) == (SUCCESS, 2)
    assert not store.complete(lost.claim, result=b"late")


def test_a_message_that_cannot_be_published_stays_failed(shared_worker: SharedWorker, command: Command) -> None:
    store, mark = shared_worker.app.queue_log.store, unique()

    def fail(name: str, task: str, message: bytes | None) -> None:
        new = NewMessage(MessageKey(f"{mark}:{name}", task), name, message=message)
        store.record(new)
        store.fail(store.claim(new, worker="w:1", lease=60.0, grace=0.0).claim, error="no")

    good = encode_message((), {}, {}, serializer="json")
    fail("foreign", "another.task", good)
    fail("plain", "plain_add", good)
    fail("empty", "echo", None)
    fail("damaged", "echo", b"damaged")

    status, said = command("requeue", "--message-id", f"{mark}:*", "--yes")

    assert (status, said["requeued"]) == (1, [])
    reasons = {one["message_id"].rpartition(":")[2]: one["reason"] for one in said["refused"]}
    assert reasons["foreign"] == reasons["plain"]
    assert "not an IdempotentTask of this app" in reasons["foreign"]
    assert reasons["empty"] == "its row no longer has a message"
    assert reasons["damaged"].startswith("its message cannot be read: the data begins with")
    assert all(row.token == 1 and row.status is Status.DONE for row in store.rows(RowFilter(message_id=f"{mark}:*")))


def test_of_two_who_requeue_one_does(shared_worker: SharedWorker) -> None:
    m = unique()
    shared_worker.task("fail").apply_async(message_id=m)
    row = failed(shared_worker, "fail", m)
    first, second = (requeue(shared_worker.app.queue_log, row) for _ in range(2))
    assert not isinstance(first, NotRequeued)
    assert second == NotRequeued(row.key, "it has changed in the meantime")
    relay(shared_worker.app.queue_log)
    shared_worker.wait_for_starts("fail", m, 2)
