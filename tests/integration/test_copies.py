"""A call that is published although its id is known, because something waits on it: its broker may lose it too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord
from celery.result import AsyncResult

from celery_idempotent.core.records import ABANDONED, Claim, Claimed, MessageKey, NewMessage, Row, Status
from celery_idempotent.maintenance.recovery import Recovery
from celery_idempotent.maintenance.rescue import Rescue
from celery_idempotent.message.serialization import decode_message, encode_result
from tests.support.bench import PATIENCE, Bench
from tests.support.waiting import wait_until

Send = Callable[[Bench, str, str], AsyncResult[Any]]


def in_a_chain(bench: Bench, m: str, queue: str) -> AsyncResult[Any]:
    first = bench.task("echo").si("value").set(message_id=m, queue=queue)
    return chain(first, bench.task("told").s("behind"), app=bench.app).apply_async()


def with_a_link(bench: Bench, m: str, queue: str) -> AsyncResult[Any]:
    return bench.task("echo").apply_async(("value",), message_id=m, queue=queue, link=bench.task("told").s("behind"))


def by_name(bench: Bench, m: str, queue: str) -> AsyncResult[Any]:
    return bench.app.send_task("echo", ("value",), message_id=m, queue=queue)


SENDS = pytest.mark.parametrize("send", [in_a_chain, with_a_link, by_name], ids=["chain", "link", "by name"])


def copys_id(result: AsyncResult[Any]) -> str:
    """Return the task id of the message with the known id."""
    return str((result.parent or result).id)


def own_row(bench: Bench, result: AsyncResult[Any]) -> Row | None:
    return bench.find("echo", copys_id(result))


def purge(bench: Bench, queue: str) -> None:
    with bench.app.connection_for_write() as connection:
        assert connection.default_channel.queue_purge(queue) == 1


@contextmanager
def consumed(bench: Bench, queue: str) -> Iterator[None]:
    """Have the worker consume from one more queue."""
    bench.app.control.add_consumer(queue, reply=True, timeout=PATIENCE, limit=1)
    try:
        yield
    finally:
        bench.app.control.cancel_consumer(queue, reply=True, timeout=PATIENCE, limit=1)


@SENDS
def test_a_copy_that_the_broker_lost_comes_back(bench: Bench, send: Send) -> None:
    m, queue = bench.fresh(), bench.fresh("queue")
    assert bench.task("echo").apply_async(("value",), message_id=m).get(timeout=PATIENCE) == "value"

    result = send(bench, m, queue)
    row = own_row(bench, result)
    assert row is not None
    assert (row.status, row.task_id) == (Status.PENDING, copys_id(result))
    purge(bench, queue)
    assert Rescue.of(bench.app.queue_log).publish_waiting(0.0) >= 1
    with consumed(bench, queue):
        assert result.get(timeout=PATIENCE) == (["value", "behind"] if send is in_a_chain else "value")
        wait_until(lambda: own_row(bench, result) is None, timeout=PATIENCE, describe="the end of the copy's row")
    if send is with_a_link:
        assert result.children[0].get(timeout=PATIENCE) == ["value", "behind"]
    assert len(bench.starts("echo", m)) == 1


@SENDS
def test_a_copy_that_arrives_leaves_no_row_behind(bench: Bench, send: Send) -> None:
    m = bench.fresh()
    assert bench.task("echo").apply_async(("value",), message_id=m).get(timeout=PATIENCE) == "value"

    result = send(bench, m, bench.spec.queue)

    assert result.get(timeout=PATIENCE) == (["value", "behind"] if send is in_a_chain else "value")
    wait_until(lambda: own_row(bench, result) is None, timeout=PATIENCE, describe="the end of the copy's row")


@SENDS
def test_a_first_message_that_the_broker_lost_comes_back_although_its_copy_ran(bench: Bench, send: Send) -> None:
    m, queue = bench.fresh(), bench.fresh("queue")
    result = send(bench, m, queue)
    purge(bench, queue)
    copy = bench.task("echo").apply_async(("value",), message_id=m, link=bench.task("told").s("copy"))
    assert copy.get(timeout=PATIENCE) == "value"
    assert copy.id != copys_id(result)

    row = own_row(bench, result)
    assert row is not None
    assert (row.status, row.task_id, row.queue) == (Status.PENDING, copys_id(result), queue)
    assert Rescue.of(bench.app.queue_log).publish_waiting(0.0) >= 1
    with consumed(bench, queue):
        assert result.get(timeout=PATIENCE) == (["value", "behind"] if send is in_a_chain else "value")
        wait_until(lambda: own_row(bench, result) is None, timeout=PATIENCE, describe="the end of its row")
    if send is with_a_link:
        assert result.children[0].get(timeout=PATIENCE) == ["value", "behind"]
    assert len(bench.starts("echo", m)) == 1


@SENDS
def test_a_first_message_that_arrives_behind_its_copy_leaves_no_row_behind(bench: Bench, send: Send) -> None:
    m, queue = bench.fresh(), bench.fresh("queue")
    result = send(bench, m, queue)
    copy = bench.task("echo").apply_async(("value",), message_id=m, link=bench.task("told").s("copy"))
    assert copy.get(timeout=PATIENCE) == "value"
    assert own_row(bench, result) is not None

    with consumed(bench, queue):
        assert result.get(timeout=PATIENCE) == (["value", "behind"] if send is in_a_chain else "value")
        wait_until(lambda: own_row(bench, result) is None, timeout=PATIENCE, describe="the end of its row")
    assert len(bench.starts("echo", m)) == 1


def test_a_first_message_comes_back_although_its_copy_retried(bench: Bench) -> None:
    """A retry of the copy's puts its own message into the row: that is not taken for the first one."""
    m, queue, told = bench.fresh(), bench.fresh("queue"), bench.task("told")
    first = bench.task("retry_n").apply_async((1,), message_id=m, queue=queue, link=told.s("first"))
    purge(bench, queue)
    copy = bench.task("retry_n").apply_async((1,), message_id=m, link=told.s("copy"))
    assert copy.get(timeout=PATIENCE) == 1
    row = bench.find("retry_n", first.id)
    assert row is not None
    assert decode_message(bench.app, row.message)[2]["link"]["args"] == ["first"]

    assert Rescue.of(bench.app.queue_log).publish_waiting(0.0) >= 1
    with consumed(bench, queue):
        assert first.get(timeout=PATIENCE) == 1
        wait_until(lambda: bench.find("retry_n", first.id) is None, timeout=PATIENCE, describe="the end of its row")
    assert first.children[0].get(timeout=PATIENCE) == [1, "first"]
    assert copy.children[0].get(timeout=PATIENCE) == [1, "copy"]
    # What was published again may have come while the copy's callbacks were being sent, and is held for a second then.
    wait_until(lambda: bench.find("retry_n", copy.id) is None, timeout=PATIENCE, describe="the end of the copy's row")


def lose_the_next_attempt(bench: Bench, key: MessageKey, task_id: str, attempt: int) -> None:
    """Claim the next attempt of a message, as a worker that then died."""
    store = bench.app.queue_log.store
    row = bench.wait_for_row("left.retry", key.message_id, lambda row: row.attempt == attempt)
    message = NewMessage(key, task_id, row.queue, row.fingerprint, attempt)
    claim = store.claim(message, worker="dead", lease=60.0, grace=30.0)
    assert isinstance(claim, Claimed)
    store.expire(claim.claim)


def test_a_chain_goes_on_although_a_copy_of_its_first_message_retried_and_died(bench: Bench) -> None:
    m, queue, told = bench.fresh(), bench.fresh("queue"), bench.task("told")
    step = bench.task("left.retry").si(1, 20.0).set(message_id=m, queue=queue)
    behind = chain(step, told.s("behind"), app=bench.app).apply_async()
    copy = bench.app.send_task("left.retry", (1, 20.0), message_id=m)
    lose_the_next_attempt(bench, MessageKey(m, "left.retry"), copy.id, 1)

    Recovery(bench.app.queue_log).run_pass()

    assert copy.get(timeout=PATIENCE) == 1
    with consumed(bench, queue):
        assert behind.get(timeout=PATIENCE) == [1, "behind"]
    assert [start.retries for start in bench.starts("left.retry", m)] == [0, 1]


def test_a_first_message_that_takes_over_goes_on_with_the_attempt(bench: Bench) -> None:
    m, queue = bench.fresh(), bench.fresh("queue")
    first = bench.task("left.retry").apply_async((9, 20.0), message_id=m, queue=queue)
    copy = bench.app.send_task("left.retry", (9, 20.0), message_id=m)
    lose_the_next_attempt(bench, MessageKey(m, "left.retry"), copy.id, 1)
    lapsed = bench.row("left.retry", m)
    assert lapsed.attempt == 1

    with consumed(bench, queue):
        starts = bench.wait_for_starts("left.retry", m, 2)

    assert [(start.task_id, start.retries) for start in starts] == [(copy.id, 0), (first.id, 1)]
    bench.wait_for_row("left.retry", m, lambda row: row.attempt == 2)


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's own
def test_a_first_message_that_died_between_its_result_and_what_waits_on_it_goes_on(bench: Bench) -> None:
    m, queue = bench.fresh(), bench.fresh("queue")
    result = in_a_chain(bench, m, queue)
    copy = bench.task("echo").apply_async(("value",), message_id=m, link=bench.task("told").s("copy"))
    assert copy.get(timeout=PATIENCE) == "value"
    bench.app.backend.store_result(copys_id(result), "value", "SUCCESS")

    with consumed(bench, queue):
        assert result.get(timeout=PATIENCE) == ["value", "behind"]

    wait_until(lambda: own_row(bench, result) is None, timeout=PATIENCE, describe="the end of its row")


@pytest.mark.parametrize("task", ["left.fail", "left.rerun"], ids=["abandoned", "taken over"])
def test_a_copy_that_meets_a_dead_owner_keeps_the_first_message(bench: Bench, task: str) -> None:
    """The first message was acknowledged, or is lost; a copy ends it as its task has it: by a failure, or by a run of its own."""
    m, queue, told, store = bench.fresh(), bench.fresh("queue"), bench.task("told"), bench.app.queue_log.store
    Path(gate := bench.path("gate")).touch()
    first = bench.task(task).apply_async((gate, "value"), message_id=m, queue=queue, link=told.s("first"))
    purge(bench, queue)
    row = bench.row(task, m)
    claim = store.claim(NewMessage(row.key, row.task_id, queue, row.fingerprint), worker="dead", lease=60.0, grace=30.0)
    assert isinstance(claim, Claimed)
    store.expire(claim.claim)

    copy = bench.task(task).apply_async((gate, "value"), message_id=m, link=told.s("copy"))
    copy.get(timeout=PATIENCE, propagate=False)
    assert bench.find(task, first.id) is not None
    assert Rescue.of(bench.app.queue_log).publish_waiting(0.0) >= 1
    with consumed(bench, queue):
        first.get(timeout=PATIENCE, propagate=False)
        wait_until(lambda: bench.find(task, first.id) is None, timeout=PATIENCE, describe="the end of its row")

    if task == "left.fail":
        assert [str(result.result).partition(";")[0] for result in (first, copy)] == [
            f"message {m!r} already failed: {ABANDONED}"
        ] * 2
    else:
        assert [result.result for result in (first, copy)] == ["value"] * 2
        assert first.children[0].get(timeout=PATIENCE) == ["value", "first"]
        assert copy.children[0].get(timeout=PATIENCE) == ["value", "copy"]
    assert len(bench.starts(task, m)) == (task == "left.rerun")


@pytest.mark.parametrize("task", ["left.fail", "left.rerun"], ids=["abandoned", "taken over"])
def test_an_owner_that_lost_its_claim_to_a_copy_is_answered(bench: Bench, task: str) -> None:
    """It slept past its lease: the copy answers its own caller only, and nothing else may ever come on a queue that is quiet."""
    m, told, store = bench.fresh(), bench.task("told"), bench.app.queue_log.store
    gate = Path(bench.path("gate"))
    first = bench.task(task).apply_async((str(gate), "value"), message_id=m, link=told.s("first"))
    wait_until(lambda: bench.starts(task, m), timeout=PATIENCE, describe="the start")
    store.expire(Claim(bench.row(task, m).key, bench.row(task, m).token))

    copy = bench.task(task).apply_async((str(gate), "value"), message_id=m, link=told.s("copy"))
    wait_until(
        lambda: bench.row(task, m).token == 2 or bench.row(task, m).status is Status.DONE,
        timeout=PATIENCE,
        describe="the copy in its place",
    )
    gate.touch()

    outcomes = [result.get(timeout=PATIENCE, propagate=False) for result in (first, copy)]
    wait_until(lambda: bench.find(task, first.id) is None, timeout=PATIENCE, describe="the end of its row")
    if task == "left.fail":
        assert [str(outcome).partition(";")[0] for outcome in outcomes] == [
            f"message {m!r} already failed: {ABANDONED}"
        ] * 2
    else:
        assert outcomes == ["value"] * 2
        assert first.children[0].get(timeout=PATIENCE) == ["value", "first"]
        assert copy.children[0].get(timeout=PATIENCE) == ["value", "copy"]


def test_a_foreign_copy_keeps_a_first_message_that_is_lost(bench: Bench) -> None:
    m, queue = bench.fresh(), bench.fresh("queue")
    first = in_a_chain(bench, m, queue)
    purge(bench, queue)

    assert bench.deliver("echo", ("value",), message_id=m).get(timeout=PATIENCE) == "value"

    assert own_row(bench, first) is not None
    assert Rescue.of(bench.app.queue_log).publish_waiting(0.0) >= 1
    with consumed(bench, queue):
        assert first.get(timeout=PATIENCE) == ["value", "behind"]
        wait_until(lambda: own_row(bench, first) is None, timeout=PATIENCE, describe="the end of its row")


def test_the_copy_of_a_failed_message_leaves_no_row_behind(bench: Bench) -> None:
    m = bench.fresh()
    first = bench.task("fail").apply_async(message_id=m)
    assert isinstance(first.get(timeout=PATIENCE, propagate=False), ValueError)

    copy = bench.task("fail").apply_async(message_id=m, link=bench.task("told").s())

    assert "as told" in str(copy.get(timeout=PATIENCE, propagate=False))
    wait_until(lambda: bench.find("fail", copy.id) is None, timeout=PATIENCE, describe="the end of the copy's row")


def test_a_copy_that_is_held_keeps_its_row_until_it_is_answered(bench: Bench) -> None:
    m, gate, told = bench.fresh(), bench.path("gate"), bench.task("told")
    bench.task("busy.hold").apply_async((gate, "value"), message_id=m)
    bench.wait_for_starts("busy.hold", m)

    copy = bench.task("busy.hold").apply_async((gate, "value"), message_id=m, link=told.s())
    bench.wait_until_held("busy.hold", m)

    row = bench.find("busy.hold", copy.id)
    assert row is not None
    assert row.status is Status.PENDING
    Path(gate).touch()
    assert copy.get(timeout=PATIENCE) == "value"
    wait_until(lambda: bench.find("busy.hold", copy.id) is None, timeout=PATIENCE, describe="the end of the copy's row")


def test_a_copy_that_could_not_be_published_leaves_no_row_behind(bench: Bench) -> None:
    m = bench.fresh()
    assert bench.task("echo").apply_async(("value",), message_id=m).get(timeout=PATIENCE) == "value"
    unreachable = bench.producer(broker="redis://127.0.0.1:1/0", task_publish_retry=False)

    with pytest.raises(Exception, match="refused"):
        unreachable.tasks["echo"].apply_async(
            ("value",), message_id=m, task_id=(copy := bench.fresh()), link=unreachable.tasks["told"].s()
        )

    assert bench.find("echo", copy) is None


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's own
def test_a_copy_that_died_between_its_result_and_what_waits_on_it_goes_on(bench: Bench) -> None:
    m, queue = bench.fresh(), bench.fresh("queue")
    assert bench.task("echo").apply_async(("value",), message_id=m).get(timeout=PATIENCE) == "value"
    result = in_a_chain(bench, m, queue)
    bench.app.backend.store_result(copys_id(result), "value", "SUCCESS")

    with consumed(bench, queue):
        assert result.get(timeout=PATIENCE) == ["value", "behind"]

    wait_until(lambda: own_row(bench, result) is None, timeout=PATIENCE, describe="the end of the copy's row")


def test_a_part_of_a_chord_waits_for_the_claim_of_an_owner_that_died(bench: Bench) -> None:
    """Celery's Redis backend lets one worker at a time send a chord's body, and forgets a dead one's claim after a while."""
    m, queue, echo = bench.fresh(), bench.fresh("queue"), bench.task("echo")
    last = echo.s("last").set(message_id=m, queue=queue)
    result = chord([echo.s("first"), last], bench.task("told").s(), app=bench.app).apply_async()
    assert result.parent.results[0].get(timeout=PATIENCE) == "first"
    row, store = bench.row("echo", m), bench.app.queue_log.store
    claim = store.claim(NewMessage(row.key, row.task_id, queue, row.fingerprint), worker="dead", lease=60.0, grace=30.0)
    assert isinstance(claim, Claimed)
    assert store.checkpoint(claim.claim, result=encode_result(bench.app, "last"))
    store.expire(claim.claim)
    key = bench.app.backend.get_key_for_group(result.parent.id, ".c")
    bench.app.backend.client.set(key, "the dead one's", ex=3)

    with consumed(bench, queue):
        bench.wait_until_held("echo", m)
        assert result.get(timeout=PATIENCE) == [["first", "last"]]

    assert bench.starts("echo", m) == []
    assert bench.done("echo", m).processed_status == "success"
