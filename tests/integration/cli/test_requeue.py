"""``requeue``: what failed runs again, as one message with what it was before."""

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
from tests.integration.test_copies import consumed
from tests.integration.test_revoke_and_expiry import revoke
from tests.support.bench import PATIENCE, Bench
from tests.support.waiting import wait_until

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
    wait_until(lambda: again(result).successful(), timeout=PATIENCE, describe=lambda: again(result).state)
    return again(result).get(timeout=PATIENCE)


def failed(bench: Bench, task: str, message_id: str) -> Row:
    row = bench.done(task, message_id)
    assert row.processed_status is FAILURE
    return row


def test_a_failed_message_runs_again_under_the_ids_that_it_had(bench: Bench, command: Command) -> None:
    m = bench.fresh()
    result = bench.task("flaky").apply_async((m, bench.path("flag")), message_id=m)
    with pytest.raises(ValueError, match="the first time"):
        result.get(timeout=PATIENCE)
    before = failed(bench, "flaky", m)

    assert requeued(command, m) == [{"message_id": m, "task_name": "flaky", "task_id": result.id}]

    assert get(result) == m
    after = bench.done("flaky", m)
    assert (after.processed_status, after.task_id, after.token) == (SUCCESS, result.id, before.token + 1)
    assert (after.created_timestamp, after.error, after.duplicates) == (before.created_timestamp, None, 0)
    assert len(bench.starts("flaky", m)) == 2


def test_what_gave_up_starts_over_with_all_its_retries(bench: Bench, command: Command) -> None:
    m = bench.fresh()
    result = bench.task("give_up").apply_async((True,), message_id=m)
    assert failed(bench, "give_up", m).attempt == 2
    with pytest.raises(ValueError, match="no use"):
        result.get(timeout=PATIENCE)

    requeued(command, m)

    bench.wait_for_starts("give_up", m, 6)
    assert failed(bench, "give_up", m).attempt == 2
    assert [start.retries for start in bench.starts("give_up", m)] == [0, 1, 2, 0, 1, 2]


def test_the_rest_of_a_chain_goes_on(bench: Bench, command: Command) -> None:
    m = bench.fresh()
    first = bench.task("flaky").s("value", bench.path("flag")).set(message_id=m)
    last = chain(first, bench.task("echo").s(), bench.task("told").s("behind"), app=bench.app).apply_async()
    with pytest.raises(ValueError, match="the first time"):
        last.get(timeout=PATIENCE)
    failed(bench, "flaky", m)

    requeued(command, m)

    assert get(last) == ["value", "behind"]
    assert get(last.parent) == "value"


def test_links_are_sent_and_errbacks_are_not_sent_twice(bench: Bench, command: Command) -> None:
    m = bench.fresh()
    result = bench.task("flaky").apply_async(
        (m, bench.path("flag")),
        message_id=m,
        link=bench.task("told").s("linked"),
        link_error=bench.task("errback").s(),
    )
    bench.wait_for_note("errback", result.id)

    requeued(command, m)

    assert get(result) == m
    wait_until(
        lambda: any(note.task == "told" for note in bench.ledger.starts("told")), timeout=PATIENCE, describe="the link"
    )
    assert [note.detail for note in bench.ledger.entries(task="errback")].count(result.id) == 1


def test_calls_of_the_body_are_not_made_twice(bench: Bench, command: Command) -> None:
    m = bench.fresh()
    result = bench.task("flaky.parent").apply_async((m, bench.path("flag")), message_id=m)
    failed(bench, "flaky.parent", m)
    bench.wait_for_note("child", f"{m}:1")

    requeued(command, m)

    children = get(result)
    assert isinstance(children, list)
    assert [AsyncResult(child, app=bench.app).get(timeout=PATIENCE) for child in children] == [f"{m}:1", f"{m}:2"]
    noted = [note.detail for note in bench.ledger.entries(task="child")]
    assert [noted.count(f"{m}:{number}") for number in (1, 2)] == [1, 1]


def test_calls_of_a_body_that_lost_a_worker_before_are_not_made_twice(bench: Bench, command: Command) -> None:
    """Its message says that a retry was for the loss; the requeued one is no retry."""
    m = bench.fresh()
    result = bench.task("flaky.lost").apply_async((m, bench.path("killed"), bench.path("flag")), message_id=m)
    assert failed(bench, "flaky.lost", m).attempt == 1

    requeued(command, m)

    assert get(result) == m
    assert [note.detail for note in bench.ledger.entries(task="child")].count(f"{m}:lost") == 1


@pytest.mark.parametrize("dies_again", [False, True], ids=["once", "twice"])
def test_calls_of_a_body_that_was_terminated_are_not_made_twice(
    bench: Bench, command: Command, dies_again: bool
) -> None:
    """It goes on under a new task id, and is taken over under that when its worker dies as well."""
    m, killed = bench.fresh(), bench.path("killed")
    if not dies_again:
        Path(killed).touch()
    result = bench.task("flaky.stuck").apply_async((m, bench.path("flag"), killed), message_id=m)
    bench.wait_for_note("child", f"{m}:stuck")
    revoke(bench, result.id, terminate=True, signal="SIGKILL")
    assert str(failed(bench, "flaky.stuck", m).error).startswith("revoked")

    (one,) = requeued(command, m)

    assert one["task_id"] != result.id
    assert AsyncResult(one["task_id"], app=bench.app).get(timeout=PATIENCE) == m
    assert bench.done("flaky.stuck", m).token == (3 if dies_again else 2)
    calls = [note.detail for note in bench.ledger.entries(task="flaky.stuck") if note.detail and note.message_id == m]
    assert len(calls) == len(bench.starts("flaky.stuck", m)) == (3 if dies_again else 2)
    assert len(set(calls)) == 1, "each time it is one and the same call"
    assert [note.detail for note in bench.ledger.entries(task="child")].count(f"{m}:stuck") == 1


def test_an_abandoned_message_runs_again(bench: Bench, command: Command) -> None:
    m = bench.fresh()
    result = bench.task("die.early").apply_async((bench.path("flag"),), message_id=m)
    assert str(failed(bench, "die.early", m).error).startswith("abandoned")

    requeued(command, "--error", "abandoned*", "--message-id", m)

    assert get(result) == "survived"
    assert bench.done("die.early", m).processed_status is SUCCESS


def test_a_revoked_message_runs_under_a_new_task_id(bench: Bench, command: Command) -> None:
    m = bench.fresh()
    result = bench.task("echo").apply_async(("late",), message_id=m, countdown=3600)
    bench.app.control.revoke(result.id)
    bench.deliver("echo", ("late",), message_id=m, task_id=result.id)
    assert failed(bench, "echo", m).error == "revoked"

    (one,) = requeued(command, m)

    assert one["task_id"] != result.id
    assert AsyncResult(one["task_id"], app=bench.app).get(timeout=PATIENCE) == "late"
    assert bench.done("echo", m).task_id == one["task_id"]


def test_an_expired_message_runs_without_its_expiry_under_a_new_task_id(bench: Bench, command: Command) -> None:
    m, queue = bench.fresh(), bench.fresh("queue")
    result = bench.task("echo").apply_async(("stale",), message_id=m, expires=0.2, queue=queue)
    wait_until(
        lambda: (bench.row("echo", m).read_at - bench.row("echo", m).created_timestamp).total_seconds() > 0.5,
        timeout=PATIENCE,
        describe="its expiry",
    )
    with consumed(bench, queue):
        assert str(failed(bench, "echo", m).error).startswith("expired")
        (one,) = requeued(command, m)
        assert one["task_id"] != result.id
        assert AsyncResult(one["task_id"], app=bench.app).get(timeout=PATIENCE) == "stale"
    assert bench.done("echo", m).processed_status is SUCCESS


def test_many_are_chosen_by_what_they_failed_with(bench: Bench, command: Command) -> None:
    mark = bench.fresh("outage")
    ids = [f"{mark}:{number}" for number in range(3)]
    results = [bench.task("flaky").apply_async((m, bench.path("flag")), message_id=m) for m in ids]
    other = f"{mark}:other"
    bench.task("fail").apply_async((mark,), message_id=other)
    for m in ids:
        failed(bench, "flaky", m)
    failed(bench, "fail", other)
    choice = ("--message-id", f"{mark}:*", "--error", "ValueError: the first time*", "--newer-than", "1h")

    status, would = command("requeue", *choice, "--dry-run")
    assert (status, would["dry_run"], [one["message_id"] for one in would["requeued"]]) == (0, True, ids)
    assert failed(bench, "flaky", ids[0]).token == 1

    assert [one["message_id"] for one in requeued(command, *choice, "--limit", "2")] == ids[:2]
    assert [one["message_id"] for one in requeued(command, *choice)] == ids[2:]
    assert [get(result) for result in results] == ids
    assert failed(bench, "fail", other).token == 1


def test_a_chord_that_has_failed_stays_so_and_one_that_is_sent_again_goes_on(bench: Bench, command: Command) -> None:
    """Its body is not sent any more, whatever becomes of a member; members that are done are replayed for a chord that is."""
    m, flag = bench.fresh(), bench.path("flag")

    def send() -> AsyncResult:
        header = [
            bench.task("flaky").s("flaky", flag).set(message_id=m),
            bench.task("echo").s("other").set(message_id=f"{m}:other"),
        ]
        return chord(header, bench.task("echo").s(), app=bench.app).apply_async()

    body = send()
    with pytest.raises(Exception, match="the first time"):
        body.get(timeout=PATIENCE)
    failed(bench, "flaky", m)

    requeued(command, m)

    bench.wait_for_row("flaky", m, lambda row: row.processed_status is SUCCESS)
    assert again(body).failed()
    assert sorted(send().get(timeout=PATIENCE)) == ["flaky", "other"]
    assert len(bench.starts("echo", f"{m}:other")) == 1
    assert len(bench.starts("flaky", m)) == 2


# -- what is refused -----------------------------------------------------------------------------------------------------------


def test_what_has_not_failed_stays_as_it_is(bench: Bench, command: Command) -> None:
    done, waits, runs, dead = (bench.fresh(what) for what in ("done", "waits", "runs", "dead"))
    bench.task("echo").apply_async((1,), message_id=done).get(timeout=PATIENCE)
    bench.task("echo").apply_async((1,), message_id=waits, queue=bench.fresh("queue"))
    gate = bench.path("gate")
    result = bench.task("gated").apply_async((gate,), message_id=runs)
    bench.wait_for_starts("gated", runs)
    store = bench.app.queue_log.store
    lost = store.claim(NewMessage(MessageKey(dead, "echo"), dead), worker="w:1", lease=60.0, grace=0.0)
    store.expire(lost.claim)

    status, said = command("requeue", done, waits, runs, dead, "never", "--yes")

    assert (status, said["requeued"], said["missing"]) == (1, [], ["no message 'never'"])
    reasons = {one["message_id"]: one["reason"] for one in said["refused"]}
    assert reasons[done].startswith("it succeeded")
    assert reasons[waits].startswith("it waits already")
    assert reasons[runs].startswith("it runs, on ")
    assert reasons[dead] == "its row has no message any more"
    assert [bench.row("echo", m).token for m in (done, waits, dead)] == [1, 0, 1]
    bench.app.queue_log.store.fail(lost.claim, error="over")
    Path(gate).touch()
    result.get(timeout=PATIENCE)


def test_a_message_whose_worker_died_runs_again(bench: Bench, command: Command) -> None:
    m, store = bench.fresh(), bench.app.queue_log.store
    message = encode_message(("value",), {}, {}, serializer="json")
    lost = store.claim(NewMessage(MessageKey(m, "echo"), m, message=message), worker="w:1", lease=60.0, grace=0.0)
    assert command("requeue", m, "--yes")[0] == 1
    store.expire(lost.claim)

    requeued(command, m)

    row = bench.wait_for_row("echo", m, lambda row: row.status is Status.DONE)
    assert (row.processed_status, row.token) == (SUCCESS, 2)
    assert not store.complete(lost.claim, result=b"late")


def test_what_cannot_be_published_stays_as_it_is(bench: Bench, command: Command) -> None:
    store, mark = bench.app.queue_log.store, bench.fresh()

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
    assert "no IdempotentTask of this app" in reasons["foreign"]
    assert reasons["empty"] == "its row has no message any more"
    assert reasons["damaged"].startswith("its message cannot be read: it does not begin with the content type")
    assert all(row.token == 1 and row.status is Status.DONE for row in store.rows(RowFilter(message_id=f"{mark}:*")))


def test_of_two_who_requeue_one_does(bench: Bench) -> None:
    m = bench.fresh()
    bench.task("fail").apply_async(message_id=m)
    row = failed(bench, "fail", m)
    first, second = (requeue(bench.app.queue_log, row) for _ in range(2))
    assert not isinstance(first, NotRequeued)
    assert second == NotRequeued(row.key, "somebody else has changed it meanwhile")
    relay(bench.app.queue_log)
    bench.wait_for_starts("fail", m, 2)
