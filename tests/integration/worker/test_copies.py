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
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.versions import CELERY
from tests.support.waiting import TIMEOUT, wait_until

Send = Callable[[SharedWorker, str, str], "AsyncResult[Any]"]


def in_a_chain(shared_worker: SharedWorker, m: str, queue: str) -> AsyncResult[Any]:
    first = shared_worker.task("echo").si("value").set(message_id=m, queue=queue)
    return chain(first, shared_worker.task("told").s("behind"), app=shared_worker.app).apply_async()


def with_a_link(shared_worker: SharedWorker, m: str, queue: str) -> AsyncResult[Any]:
    return shared_worker.task("echo").apply_async(
        ("value",), message_id=m, queue=queue, link=shared_worker.task("told").s("behind")
    )


def by_name(shared_worker: SharedWorker, m: str, queue: str) -> AsyncResult[Any]:
    return shared_worker.app.send_task("echo", ("value",), message_id=m, queue=queue)


SENDS = pytest.mark.parametrize("send", [in_a_chain, with_a_link, by_name], ids=["chain", "link", "by name"])


def copys_id(result: AsyncResult[Any]) -> str:
    """Return the task id of the message with the known id."""
    return str((result.parent or result).id)


def own_row(shared_worker: SharedWorker, result: AsyncResult[Any]) -> Row | None:
    return shared_worker.find("echo", copys_id(result))


def purge(shared_worker: SharedWorker, queue: str) -> None:
    with shared_worker.app.connection_for_write() as connection:
        assert connection.default_channel.queue_purge(queue) == 1


@contextmanager
def consumed(shared_worker: SharedWorker, queue: str) -> Iterator[None]:
    """Have the worker consume from one more queue."""
    shared_worker.app.control.add_consumer(queue, reply=True, timeout=TIMEOUT, limit=1)
    try:
        yield
    finally:
        shared_worker.app.control.cancel_consumer(queue, reply=True, timeout=TIMEOUT, limit=1)


@SENDS
def test_a_copy_that_the_broker_lost_comes_back(shared_worker: SharedWorker, send: Send) -> None:
    m, queue = unique(), unique("queue")
    assert shared_worker.task("echo").apply_async(("value",), message_id=m).get(timeout=TIMEOUT) == "value"

    result = send(shared_worker, m, queue)
    row = own_row(shared_worker, result)
    assert row is not None
    assert (row.status, row.task_id) == (Status.PENDING, copys_id(result))
    purge(shared_worker, queue)
    assert Rescue.of(shared_worker.app.queue_log).publish_waiting(0.0) >= 1
    with consumed(shared_worker, queue):
        assert result.get(timeout=TIMEOUT) == (["value", "behind"] if send is in_a_chain else "value")
        wait_until(lambda: own_row(shared_worker, result) is None, describe="the end of the copy's row")
    if send is with_a_link:
        assert result.children[0].get(timeout=TIMEOUT) == ["value", "behind"]
    assert len(shared_worker.starts("echo", m)) == 1


@SENDS
def test_a_copy_that_arrives_leaves_no_row(shared_worker: SharedWorker, send: Send) -> None:
    m = unique()
    assert shared_worker.task("echo").apply_async(("value",), message_id=m).get(timeout=TIMEOUT) == "value"

    result = send(shared_worker, m, shared_worker.spec.queue)

    assert result.get(timeout=TIMEOUT) == (["value", "behind"] if send is in_a_chain else "value")
    wait_until(lambda: own_row(shared_worker, result) is None, describe="the end of the copy's row")


@SENDS
def test_a_lost_first_message_comes_back_after_its_copy_ran(shared_worker: SharedWorker, send: Send) -> None:
    m, queue = unique(), unique("queue")
    result = send(shared_worker, m, queue)
    purge(shared_worker, queue)
    copy = shared_worker.task("echo").apply_async(("value",), message_id=m, link=shared_worker.task("told").s("copy"))
    assert copy.get(timeout=TIMEOUT) == "value"
    assert copy.id != copys_id(result)

    row = own_row(shared_worker, result)
    assert row is not None
    assert (row.status, row.task_id, row.queue) == (Status.PENDING, copys_id(result), queue)
    assert Rescue.of(shared_worker.app.queue_log).publish_waiting(0.0) >= 1
    with consumed(shared_worker, queue):
        assert result.get(timeout=TIMEOUT) == (["value", "behind"] if send is in_a_chain else "value")
        wait_until(lambda: own_row(shared_worker, result) is None, describe="the end of its row")
    if send is with_a_link:
        assert result.children[0].get(timeout=TIMEOUT) == ["value", "behind"]
    assert len(shared_worker.starts("echo", m)) == 1


@SENDS
def test_a_first_message_arriving_after_its_copy_leaves_no_row(shared_worker: SharedWorker, send: Send) -> None:
    m, queue = unique(), unique("queue")
    result = send(shared_worker, m, queue)
    copy = shared_worker.task("echo").apply_async(("value",), message_id=m, link=shared_worker.task("told").s("copy"))
    assert copy.get(timeout=TIMEOUT) == "value"
    assert own_row(shared_worker, result) is not None

    with consumed(shared_worker, queue):
        assert result.get(timeout=TIMEOUT) == (["value", "behind"] if send is in_a_chain else "value")
        wait_until(lambda: own_row(shared_worker, result) is None, describe="the end of its row")
    assert len(shared_worker.starts("echo", m)) == 1


def test_a_first_message_comes_back_although_its_copy_retried(shared_worker: SharedWorker) -> None:
    """A retry of the copy's puts its own message into the row: that is not taken for the first one."""
    m, queue, told = unique(), unique("queue"), shared_worker.task("told")
    first = shared_worker.task("retry_n").apply_async((1,), message_id=m, queue=queue, link=told.s("first"))
    purge(shared_worker, queue)
    copy = shared_worker.task("retry_n").apply_async((1,), message_id=m, link=told.s("copy"))
    assert copy.get(timeout=TIMEOUT) == 1
    row = shared_worker.find("retry_n", first.id)
    assert row is not None
    assert decode_message(shared_worker.app, row.message)[2]["link"]["args"] == ["first"]

    assert Rescue.of(shared_worker.app.queue_log).publish_waiting(0.0) >= 1
    with consumed(shared_worker, queue):
        assert first.get(timeout=TIMEOUT) == 1
        wait_until(lambda: shared_worker.find("retry_n", first.id) is None, describe="the end of its row")
    assert first.children[0].get(timeout=TIMEOUT) == [1, "first"]
    assert copy.children[0].get(timeout=TIMEOUT) == [1, "copy"]
    # What was published again may have come while the copy's callbacks were being sent, and is held for a second then.
    wait_until(lambda: shared_worker.find("retry_n", copy.id) is None, describe="the end of the copy's row")


def lose_the_next_attempt(shared_worker: SharedWorker, key: MessageKey, task_id: str, attempt: int) -> None:
    """Claim the next attempt of a message, as a worker that then died."""
    store = shared_worker.app.queue_log.store
    row = shared_worker.wait_for_row("left.retry", key.message_id, lambda row: row.attempt == attempt)
    message = NewMessage(key, task_id, row.queue, row.fingerprint, attempt)
    claim = store.claim(message, worker="dead", lease=60.0, grace=30.0)
    assert isinstance(claim, Claimed)
    store.expire(claim.claim)


def test_a_chain_goes_on_after_a_copy_retried_and_died(shared_worker: SharedWorker) -> None:
    m, queue, told = unique(), unique("queue"), shared_worker.task("told")
    step = shared_worker.task("left.retry").si(1, 20.0).set(message_id=m, queue=queue)
    behind = chain(step, told.s("behind"), app=shared_worker.app).apply_async()
    copy = shared_worker.app.send_task("left.retry", (1, 20.0), message_id=m)
    lose_the_next_attempt(shared_worker, MessageKey(m, "left.retry"), copy.id, 1)

    Recovery(shared_worker.app.queue_log).run_pass()

    assert copy.get(timeout=TIMEOUT) == 1
    with consumed(shared_worker, queue):
        assert behind.get(timeout=TIMEOUT) == [1, "behind"]
    assert [start.retries for start in shared_worker.starts("left.retry", m)] == [0, 1]


def test_a_first_message_that_takes_over_goes_on_with_the_attempt(shared_worker: SharedWorker) -> None:
    m, queue = unique(), unique("queue")
    first = shared_worker.task("left.retry").apply_async((9, 20.0), message_id=m, queue=queue)
    copy = shared_worker.app.send_task("left.retry", (9, 20.0), message_id=m)
    lose_the_next_attempt(shared_worker, MessageKey(m, "left.retry"), copy.id, 1)
    lapsed = shared_worker.row("left.retry", m)
    assert lapsed.attempt == 1

    with consumed(shared_worker, queue):
        starts = shared_worker.wait_for_starts("left.retry", m, 2)

    assert [(start.task_id, start.retries) for start in starts] == [(copy.id, 0), (first.id, 1)]
    shared_worker.wait_for_row("left.retry", m, lambda row: row.attempt == 2)


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's own
def test_a_first_message_that_died_before_its_callbacks_goes_on(shared_worker: SharedWorker) -> None:
    m, queue = unique(), unique("queue")
    result = in_a_chain(shared_worker, m, queue)
    copy = shared_worker.task("echo").apply_async(("value",), message_id=m, link=shared_worker.task("told").s("copy"))
    assert copy.get(timeout=TIMEOUT) == "value"
    shared_worker.app.backend.store_result(copys_id(result), "value", "SUCCESS")

    with consumed(shared_worker, queue):
        assert result.get(timeout=TIMEOUT) == ["value", "behind"]

    wait_until(lambda: own_row(shared_worker, result) is None, describe="the end of its row")


@pytest.mark.parametrize("task", ["left.fail", "left.rerun"], ids=["abandoned", "taken over"])
def test_a_copy_that_meets_a_dead_owner_keeps_the_first_message(shared_worker: SharedWorker, task: str) -> None:
    """The first message was acknowledged, or is lost; a copy ends it as its task has it: by a failure, or by a run of its own."""
    m, queue, told, store = (
        unique(),
        unique("queue"),
        shared_worker.task("told"),
        shared_worker.app.queue_log.store,
    )
    Path(gate := shared_worker.path("gate")).touch()
    first = shared_worker.task(task).apply_async((gate, "value"), message_id=m, queue=queue, link=told.s("first"))
    purge(shared_worker, queue)
    row = shared_worker.row(task, m)
    claim = store.claim(NewMessage(row.key, row.task_id, queue, row.fingerprint), worker="dead", lease=60.0, grace=30.0)
    assert isinstance(claim, Claimed)
    store.expire(claim.claim)

    copy = shared_worker.task(task).apply_async((gate, "value"), message_id=m, link=told.s("copy"))
    copy.get(timeout=TIMEOUT, propagate=False)
    assert shared_worker.find(task, first.id) is not None
    assert Rescue.of(shared_worker.app.queue_log).publish_waiting(0.0) >= 1
    with consumed(shared_worker, queue):
        first.get(timeout=TIMEOUT, propagate=False)
        wait_until(lambda: shared_worker.find(task, first.id) is None, describe="the end of its row")

    if task == "left.fail":
        assert [str(result.result).partition(";")[0] for result in (first, copy)] == [
            f"message {m!r} already failed: {ABANDONED}"
        ] * 2
    else:
        assert [result.result for result in (first, copy)] == ["value"] * 2
        assert first.children[0].get(timeout=TIMEOUT) == ["value", "first"]
        assert copy.children[0].get(timeout=TIMEOUT) == ["value", "copy"]
    assert len(shared_worker.starts(task, m)) == (task == "left.rerun")


@pytest.mark.parametrize("task", ["left.fail", "left.rerun"], ids=["abandoned", "taken over"])
def test_an_owner_that_lost_its_claim_to_a_copy_is_answered(shared_worker: SharedWorker, task: str) -> None:
    """It slept past its lease: the copy answers its own caller only, and nothing else may ever come on a queue that is quiet."""
    m, told, store = unique(), shared_worker.task("told"), shared_worker.app.queue_log.store
    gate = Path(shared_worker.path("gate"))
    first = shared_worker.task(task).apply_async((str(gate), "value"), message_id=m, link=told.s("first"))
    wait_until(lambda: shared_worker.starts(task, m), describe="the start")
    store.expire(Claim(shared_worker.row(task, m).key, shared_worker.row(task, m).token))

    copy = shared_worker.task(task).apply_async((str(gate), "value"), message_id=m, link=told.s("copy"))
    wait_until(
        lambda: shared_worker.row(task, m).token == 2 or shared_worker.row(task, m).status is Status.DONE,
        describe="the copy in its place",
    )
    gate.touch()

    outcomes = [result.get(timeout=TIMEOUT, propagate=False) for result in (first, copy)]
    wait_until(lambda: shared_worker.find(task, first.id) is None, describe="the end of its row")
    if task == "left.fail":
        assert [str(outcome).partition(";")[0] for outcome in outcomes] == [
            f"message {m!r} already failed: {ABANDONED}"
        ] * 2
    else:
        assert outcomes == ["value"] * 2
        assert first.children[0].get(timeout=TIMEOUT) == ["value", "first"]
        assert copy.children[0].get(timeout=TIMEOUT) == ["value", "copy"]


def test_a_foreign_copy_keeps_a_first_message_that_is_lost(shared_worker: SharedWorker) -> None:
    m, queue = unique(), unique("queue")
    first = in_a_chain(shared_worker, m, queue)
    purge(shared_worker, queue)

    assert shared_worker.deliver("echo", ("value",), message_id=m).get(timeout=TIMEOUT) == "value"

    assert own_row(shared_worker, first) is not None
    assert Rescue.of(shared_worker.app.queue_log).publish_waiting(0.0) >= 1
    with consumed(shared_worker, queue):
        assert first.get(timeout=TIMEOUT) == ["value", "behind"]
        wait_until(lambda: own_row(shared_worker, first) is None, describe="the end of its row")


def test_the_copy_of_a_failed_message_leaves_no_row(shared_worker: SharedWorker) -> None:
    m = unique()
    first = shared_worker.task("fail").apply_async(message_id=m)
    assert isinstance(first.get(timeout=TIMEOUT, propagate=False), ValueError)

    copy = shared_worker.task("fail").apply_async(message_id=m, link=shared_worker.task("told").s())

    assert "as told" in str(copy.get(timeout=TIMEOUT, propagate=False))
    wait_until(lambda: shared_worker.find("fail", copy.id) is None, describe="the end of the copy's row")


def test_a_copy_that_is_held_keeps_its_row_until_it_is_answered(shared_worker: SharedWorker) -> None:
    m, gate, told = unique(), shared_worker.path("gate"), shared_worker.task("told")
    shared_worker.task("busy.hold").apply_async((gate, "value"), message_id=m)
    shared_worker.wait_for_starts("busy.hold", m)

    copy = shared_worker.task("busy.hold").apply_async((gate, "value"), message_id=m, link=told.s())
    shared_worker.wait_until_held("busy.hold", m)

    row = shared_worker.find("busy.hold", copy.id)
    assert row is not None
    assert row.status is Status.PENDING
    Path(gate).touch()
    assert copy.get(timeout=TIMEOUT) == "value"
    wait_until(lambda: shared_worker.find("busy.hold", copy.id) is None, describe="the end of the copy's row")


def test_an_unpublished_copy_leaves_no_row(shared_worker: SharedWorker) -> None:
    m = unique()
    assert shared_worker.task("echo").apply_async(("value",), message_id=m).get(timeout=TIMEOUT) == "value"
    unreachable = shared_worker.producer(broker="redis://127.0.0.1:1/0", task_publish_retry=False)

    with pytest.raises(Exception, match="refused"):
        unreachable.tasks["echo"].apply_async(
            ("value",), message_id=m, task_id=(copy := unique()), link=unreachable.tasks["told"].s()
        )

    assert shared_worker.find("echo", copy) is None


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's own
def test_a_copy_that_died_before_its_callbacks_goes_on(shared_worker: SharedWorker) -> None:
    m, queue = unique(), unique("queue")
    assert shared_worker.task("echo").apply_async(("value",), message_id=m).get(timeout=TIMEOUT) == "value"
    result = in_a_chain(shared_worker, m, queue)
    shared_worker.app.backend.store_result(copys_id(result), "value", "SUCCESS")

    with consumed(shared_worker, queue):
        assert result.get(timeout=TIMEOUT) == ["value", "behind"]

    wait_until(lambda: own_row(shared_worker, result) is None, describe="the end of the copy's row")


@pytest.mark.skipif(CELERY < (5, 7), reason="Celery's Redis backend claims a chord's body since 5.7")
def test_a_chords_part_waits_for_a_dead_owners_claim(shared_worker: SharedWorker) -> None:
    """Celery's Redis backend lets one worker at a time send a chord's body, and forgets a dead one's claim after a while."""
    m, queue, echo = unique(), unique("queue"), shared_worker.task("echo")
    last = echo.s("last").set(message_id=m, queue=queue)
    result = chord([echo.s("first"), last], shared_worker.task("told").s(), app=shared_worker.app).apply_async()
    assert result.parent.results[0].get(timeout=TIMEOUT) == "first"
    row, store = shared_worker.row("echo", m), shared_worker.app.queue_log.store
    claim = store.claim(NewMessage(row.key, row.task_id, queue, row.fingerprint), worker="dead", lease=60.0, grace=30.0)
    assert isinstance(claim, Claimed)
    assert store.checkpoint(claim.claim, result=encode_result(shared_worker.app, "last"))
    store.expire(claim.claim)
    key = shared_worker.app.backend.get_key_for_group(result.parent.id, ".c")
    shared_worker.app.backend.client.set(key, "the dead one's", ex=3)

    with consumed(shared_worker, queue):
        shared_worker.wait_until_held("echo", m)
        assert result.get(timeout=TIMEOUT) == [["first", "last"]]

    assert shared_worker.starts("echo", m) == []
    assert shared_worker.wait_until_done("echo", m).processed_status == "success"
