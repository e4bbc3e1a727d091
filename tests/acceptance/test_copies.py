"""A message that is on the broker more than once runs once. What waits on any of its copies continues.

"By hand" is a message taken off a queue and put back byte by byte, as a broker or a person would: past Celery and the library.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord

from celery_idempotent.core.records import Claimed, MessageKey, NewMessage
from celery_idempotent.queue_log import QueueLog
from tests.support.apps import OpenApp
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import wait_until


@pytest.mark.parametrize("times", [2, 10], ids=["twice", "ten-times"])
def test_the_same_message_put_on_the_broker_by_hand(guarded: SharedWorker, plain: SharedWorker, times: int) -> None:
    key = unique()
    _, again = plain.copies(lambda queue: plain.task("once").apply_async((key,), queue=queue))
    result, message = guarded.copies(lambda queue: guarded.task("once").apply_async((key,), queue=queue))

    plain.put(again, times=times)
    guarded.put(message, times=times)

    value = result.get(timeout=60)
    row = guarded.wait_until_done("once", result.id, duplicates=times - 1)
    guarded.wait_until_idle()
    assert len(guarded.starts_under(key)) == 1
    assert (row.processed_status, row.duplicates, row.token) == ("success", times - 1, 1)
    assert guarded.app.AsyncResult(result.id).get(timeout=60) == value
    plain.wait_for_starts_under(key, times)


def test_copies_that_arrive_while_it_runs(guarded: SharedWorker, plain: SharedWorker, tmp_path: Path) -> None:
    key, gate = unique(), tmp_path / "gate"
    _, again = plain.copies(lambda queue: plain.task("once").apply_async((key, str(gate)), queue=queue))
    result, message = guarded.copies(lambda queue: guarded.task("once").apply_async((key, str(gate)), queue=queue))

    plain.put(again, times=3)
    guarded.put(message, times=3)
    plain.wait_for_starts_under(key, 2)
    # Held: the worker's other process acknowledges it as ignored and publishes it again.
    guarded.worker.wait_for_log(f"Task once[{result.id}] ignored", timeout=60)
    assert len(guarded.starts_under(key)) == 1
    gate.touch()

    assert result.get(timeout=60).startswith(key)
    guarded.wait_until_done("once", result.id, duplicates=2)
    guarded.wait_until_idle()
    assert len(guarded.starts_under(key)) == 1
    plain.wait_for_starts_under(key, 3)


def test_send_task_with_the_same_message_id_is_a_duplicate(
    guarded: SharedWorker, plain: SharedWorker, open_app: OpenApp
) -> None:
    key, message_id = unique(), unique("message")
    # A producer that has neither the tasks nor the library.
    settings = {name: value for name, value in guarded.spec.settings.items() if not name.startswith("idempotent")}
    stranger = open_app(replace(guarded.spec, base="plain", tasks=(), settings=settings))

    results = [app.send_task("once", (key,), message_id=message_id) for app in (guarded.app, stranger) * 2]
    doubles = [plain.app.send_task("once", (key,), message_id=message_id) for _ in results]

    assert len({result.id for result in results}) == 4
    assert len({result.get(timeout=60) for result in results}) == 1
    row = guarded.wait_until_done("once", message_id, duplicates=3)
    assert (len(guarded.starts_under(key)), row.processed_status) == (1, "success")
    assert row.task_id in {result.id for result in results}
    assert len({double.get(timeout=60) for double in doubles}) == 4


def test_the_callback_of_a_message_put_on_the_broker_three_times(guarded: SharedWorker, plain: SharedWorker) -> None:
    key, after = unique(), unique("after")

    def linked(shared_worker: SharedWorker, queue: str) -> Any:
        return shared_worker.task("once").apply_async((key,), link=shared_worker.task("receive").s(after), queue=queue)

    _, again = plain.copies(lambda queue: linked(plain, queue))
    result, message = guarded.copies(lambda queue: linked(guarded, queue))
    plain.put(again, times=3)
    guarded.put(message, times=3)

    value = result.get(timeout=60)
    guarded.wait_until_done("once", result.id, duplicates=2)
    guarded.wait_until_idle()
    (callback,) = guarded.app.AsyncResult(result.id).children
    assert callback.get(timeout=60) == value
    assert (len(guarded.starts_under(key)), len(guarded.starts_under(after))) == (1, 1)
    plain.wait_for_starts_under(after, 3)


def test_a_duplicates_own_callback_is_sent(guarded: SharedWorker, plain: SharedWorker) -> None:
    key, first, second = unique(), unique("first"), unique("second")

    def send(shared_worker: SharedWorker, after: str) -> Any:
        return shared_worker.task("order").apply_async((key,), link=shared_worker.task("receive").s(after))

    results = [send(guarded, after) for after in (first, second)]
    doubles = [send(plain, after) for after in (first, second)]

    assert len({result.get(timeout=60) for result in results}) == 1
    received = [guarded.app.AsyncResult(result.id).children[0].get(timeout=60) for result in results]
    assert received == [result.get(timeout=60) for result in results]
    guarded.wait_until_idle()
    assert [len(guarded.starts_under(key)), len(guarded.starts_under(first)), len(guarded.starts_under(second))] == [
        1,
        1,
        1,
    ]
    assert len({double.get(timeout=60) for double in doubles}) == 2


def test_the_first_step_of_a_chain_put_on_the_broker_three_times(guarded: SharedWorker, plain: SharedWorker) -> None:
    key, after = unique(), unique("after")

    def chained(shared_worker: SharedWorker, queue: str) -> Any:
        return chain(
            shared_worker.task("once").s(key).set(queue=queue), shared_worker.task("receive").s(after)
        ).apply_async()

    _, again = plain.copies(lambda queue: chained(plain, queue))
    result, message = guarded.copies(lambda queue: chained(guarded, queue))
    plain.put(again, times=3)
    guarded.put(message, times=3)

    value = result.get(timeout=60)
    assert value == result.parent.get(timeout=60)
    guarded.wait_until_done("once", result.parent.id, duplicates=2)
    guarded.wait_until_idle()
    assert (len(guarded.starts_under(key)), len(guarded.starts_under(after))) == (1, 1)
    plain.wait_for_starts_under(after, 3)


def test_a_duplicate_in_a_chain(guarded: SharedWorker, plain: SharedWorker) -> None:
    key, tails = unique(), [unique("tail") for _ in range(2)]

    def send(shared_worker: SharedWorker, tail: str) -> Any:
        return chain(shared_worker.task("order").s(key), shared_worker.task("receive").s(tail)).apply_async()

    results = [send(guarded, tail) for tail in tails]
    doubles = [send(plain, tail) for tail in tails]

    assert len({result.get(timeout=60) for result in results}) == 1
    assert [result.parent.state for result in results] == ["SUCCESS", "SUCCESS"]
    guarded.wait_until_idle()
    assert len(guarded.starts_under(key)) == 1
    assert [len(guarded.starts_under(tail)) for tail in tails] == [1, 1]
    assert len({double.get(timeout=60) for double in doubles}) == 2


def test_the_header_of_a_chord_put_on_the_broker_twice(guarded: SharedWorker, plain: SharedWorker) -> None:
    keys, after = [unique(), unique()], unique("after")

    def send(shared_worker: SharedWorker, queue: str) -> Any:
        return chord([shared_worker.task("once").s(key).set(queue=queue) for key in keys])(
            shared_worker.task("receive").s(after)
        )

    _, again = plain.copies(lambda queue: send(plain, queue), count=2)
    result, messages = guarded.copies(lambda queue: send(guarded, queue), count=2)
    plain.put(again, times=2)
    guarded.put(messages, times=2)

    values = result.get(timeout=60)
    assert [value.split(" by ")[0] for value in values] == keys
    for message in messages:
        guarded.wait_until_done("once", message.properties["message_id"], duplicates=1)
    guarded.wait_until_idle()
    assert [len(guarded.starts_under(key)) for key in (*keys, after)] == [1, 1, 1]
    wait_until(lambda: [len(plain.starts_under(key)) for key in keys] == [2, 2], describe="plain Celery's doubles")


def test_a_duplicate_in_a_chord(guarded: SharedWorker, plain: SharedWorker) -> None:
    key, other, after = unique(), unique(), unique("after")

    def send(shared_worker: SharedWorker) -> Any:
        order, once, receive = (shared_worker.task(name) for name in ("order", "once", "receive"))
        return chord([order.s(key), order.s(key), once.s(other)])(receive.s(after))

    result, double = send(guarded), send(plain)

    first, second, third = result.get(timeout=60)
    assert first == second != third
    guarded.wait_until_idle()
    assert [len(guarded.starts_under(key)), len(guarded.starts_under(other)), len(guarded.starts_under(after))] == [
        1,
        1,
        1,
    ]
    first, second, _ = double.get(timeout=60)
    assert first != second


def test_a_duplicate_overtakes_the_message_it_repeats(guarded: SharedWorker, plain: SharedWorker) -> None:
    key, first, second = unique(), unique("first"), unique("second")

    def send(shared_worker: SharedWorker, after: str, **options: str) -> Any:
        return shared_worker.task("order").apply_async((key,), link=shared_worker.task("receive").s(after), **options)

    _, plain_message = plain.copies(lambda queue: send(plain, first, queue=queue))
    earlier, message = guarded.copies(lambda queue: send(guarded, first, queue=queue))
    later = send(guarded, second)
    assert later.get(timeout=60) == guarded.app.AsyncResult(later.id).children[0].get(timeout=60)
    plain_later = send(plain, second)
    guarded.put(message)
    plain.put(plain_message)

    assert earlier.get(timeout=60) == later.get(timeout=60)
    assert guarded.app.AsyncResult(earlier.id).children[0].get(timeout=60) == later.get(timeout=60)
    guarded.wait_until_idle()
    assert [len(guarded.starts_under(key)), len(guarded.starts_under(first)), len(guarded.starts_under(second))] == [
        1,
        1,
        1,
    ]
    assert plain_later.get(timeout=60)
    plain.wait_for_starts_under(key, 2)


def test_a_copy_waits_for_the_end_of_a_dead_workers_lease(guarded: SharedWorker) -> None:
    key = unique()
    result, message = guarded.copies(lambda queue: guarded.task("once").apply_async((key,), queue=queue))
    # A worker elsewhere, which claims and is never heard of again.
    dead = NewMessage(MessageKey(result.id, "once"), task_id=result.id)
    claim = QueueLog.of(guarded.app).store.claim(dead, worker="dead@test:1", lease=0.5, grace=0.0)
    assert isinstance(claim, Claimed)

    guarded.put(message)

    assert result.get(timeout=60).startswith(key)
    row = guarded.wait_until_done("once", result.id)
    assert (len(guarded.starts_under(key)), row.processed_status, row.token) == (1, "success", 2)
