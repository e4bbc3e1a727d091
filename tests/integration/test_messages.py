"""``queue_log.find``, ``find_id``, ``rows``, ``requeue`` and ``forget``, on each store; and what a call's result says of its message."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, Task, chain, signature
from redis import Redis

from celery_idempotent import (
    ConfigurationError,
    DuplicateMessageError,
    IdempotentTask,
    QueueLog,
    RefusedError,
    by_arguments,
    outbox,
)
from celery_idempotent.core.records import (
    ABANDONED,
    FORGOTTEN,
    Claim,
    Claimed,
    MessageKey,
    NewMessage,
    ProcessedStatus,
    Row,
    Status,
)
from celery_idempotent.records import Requeued
from celery_idempotent.stores import open_store
from tests.support.apps.spec import close_app
from tests.support.stores import mariadb_store, postgresql_store, sqlite_store


@pytest.fixture(params=["sqlite", "postgresql", "mariadb", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Yield an empty store."""
    table = f"messages_{uuid4().hex[:12]}"
    match request.param:
        case "sqlite":
            yield open_store(sqlite_store(tmp_path))
        case "postgresql":
            with postgresql_store(request.getfixturevalue("postgresql_url")) as url:
                yield from _opened(url)
        case "mariadb":
            with mariadb_store(request.getfixturevalue("mariadb_url")) as url:
                yield from _opened(url)
        case "redis":
            url = request.getfixturevalue("redis_url")
            yield open_store(url, table=table)
            with Redis.from_url(url) as client:
                for key in client.scan_iter(match=f"{{{table}:*", count=1000):
                    client.delete(key)


def _opened(url: str) -> Iterator[Any]:
    opened = open_store(url)
    yield opened
    opened.close()


@pytest.fixture
def app(store: Any) -> Iterator[Celery]:
    """Yield an app with that store; its broker is in memory."""
    with opened_app(store) as app:
        yield app


@pytest.fixture
def small_app(tmp_path: Path) -> Iterator[Celery]:
    """Yield the same app on SQLite, for what no store has a part in."""
    with opened_app(open_store(sqlite_store(tmp_path))) as app:
        yield app


@contextmanager
def opened_app(store: Any, broker: str = "memory://") -> Iterator[Celery]:
    app = Celery("shop", broker=broker, backend="cache+memory://", set_as_current=False)
    app.conf.task_default_queue = f"shop-{uuid4().hex[:8]}"
    QueueLog(app, store=store).init()

    @app.task(base=IdempotentTask, name="charge", message_id="order:{order_id}", shared=False)
    def charge(order_id: str, amount: int = 0) -> str:
        return f"{order_id}: {amount}"

    @app.task(base=IdempotentTask, name="fail", message_id=by_arguments("order.id"), shared=False)
    def fail(order: dict[str, Any], text: str = "no") -> None:
        raise ValueError(text)

    @app.task(base=IdempotentTask, name="resize", shared=False)
    def resize(image: int) -> int:
        return image

    @app.task(name="plain", shared=False)
    def plain() -> None: ...

    app.finalize()
    yield app
    close_app(app)


def queue_log(app: Celery) -> QueueLog:
    log: QueueLog = app.queue_log
    return log


def failed(app: Celery, order: str, text: str = "no") -> Row:
    """Run a message that fails, as a worker would; return its row."""
    app.tasks["fail"].apply(({"id": order},), {"text": text})
    row = queue_log(app).find("fail", {"id": order})
    assert row is not None
    assert row.processed_status is ProcessedStatus.FAILURE
    return row


def claim(log: QueueLog, message: NewMessage) -> Claim:
    answer = log.store.claim(message, worker="w:1", lease=60.0, grace=0.0)
    assert isinstance(answer, Claimed)
    return answer.claim


def recorded_failure(app: Celery, order: str) -> Row:
    """Return the row of a message that was published, claimed and failed, with its message."""
    log, result = queue_log(app), app.tasks["fail"].delay({"id": order})
    key = MessageKey(result.message_id, "fail")
    assert log.store.fail(claim(log, NewMessage(key, result.id)), error="ValueError: no")
    row = log.find_id("fail", result.message_id)
    assert row is not None
    return row


# -- find --------------------------------------------------------------------------------------------------------------


def test_the_message_of_a_call_is_found_by_its_arguments(app: Celery) -> None:
    log, charge = queue_log(app), app.tasks["charge"]
    assert log.find(charge, "o-1", 500) is None
    result = charge.delay("o-1", 500)

    for row in (
        log.find(charge, "o-1", 500),
        log.find("charge", order_id="o-1"),
        log.find_id(charge, "order:o-1"),
        log.find_id("charge", result.message_id),
        charge.queue_log.find(charge, "o-1", amount=7),  # the id is made of the order alone
    ):
        assert row is not None
        assert (row.key, row.task_id, row.status) == (MessageKey("order:o-1", "charge"), result.id, Status.PENDING)
        assert row.message is not None
    assert log.find_id("fail", "order:o-1") is None
    assert log.find_id("charge", "order:*") is None


def test_what_the_broker_will_see_is_what_is_found(app: Celery) -> None:
    result = app.tasks["fail"].delay({"id": (1, {2: "x"})})
    row = queue_log(app).find("fail", {"id": [1, {"2": "x"}]})
    assert row is not None
    assert row.task_id == result.id


def test_what_is_no_message_is_not_found(small_app: Celery) -> None:
    log = queue_log(small_app)
    assert log.find_id("charge", "") is None
    assert log.find_id("charge", "a\0b") is None
    assert log.find_id("no such task", "order:o-1") is None


@pytest.mark.parametrize(
    ("task", "args", "error", "says"),
    [
        ("resize", (1,), ConfigurationError, r"task resize has no message_id.*find_id\(task, result.message_id\)"),
        ("chrage", (1,), ConfigurationError, r"this app has no task 'chrage'; did you mean 'charge'\?"),
        ("zzz", (1,), ConfigurationError, r"this app has no task 'zzz'; import its module"),
        ("plain", (), ConfigurationError, r"plain is not a task with base=IdempotentTask"),
        (7, (), ConfigurationError, r"7 is not a task"),
        ("charge", (), TypeError, r"missing a required argument: 'order_id'"),
        ("fail", ({"di": 1},), ConfigurationError, r"order has no 'id' in this call"),
    ],
)
def test_a_call_that_cannot_be_found_is_refused(
    small_app: Celery, task: Any, args: tuple[Any, ...], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        queue_log(small_app).find(task, *args)


def test_an_id_must_be_text(small_app: Celery) -> None:
    with pytest.raises(TypeError, match="message_id must be a string, not int: all ids are text"):
        queue_log(small_app).find_id("charge", 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="7 is neither a task nor the name of one"):
        queue_log(small_app).find_id(7, "order:1")


def test_an_app_has_its_queue_log_before_its_tasks_are_bound() -> None:
    first, second = (Celery(name, set_as_current=False, idempotent_store="sqlite://") for name in ("a", "b"))
    assert "queue_log" not in vars(first)
    assert first.queue_log is first.queue_log is QueueLog.of(first)
    assert first.queue_log is not second.queue_log
    own = QueueLog(first)
    assert first.queue_log is own


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_meet_all_conditions(app: Celery) -> None:
    log, charge, resize = queue_log(app), app.tasks["charge"], app.tasks["resize"]
    for number in range(3):
        charge.delay(f"o-{number}")
    resize.apply((1,), task_id="image-1")
    gone = failed(app, "o-1", "not there")

    def ids(**conditions: Any) -> list[str]:
        return sorted(row.key.message_id for row in log.rows(**conditions))

    orders = [f"order:o-{number}" for number in range(3)]
    assert ids() == sorted([*orders, "image-1", gone.key.message_id])
    assert ids(task=charge) == ids(task="charge") == ids(task="ch*") == ids(status="pending") == orders
    assert ids(message_id="order:o-1") == ["order:o-1"]
    assert ids(message_id="order:*", limit=1, oldest_first=True) == orders[:1]
    assert ids(message_id="order:*", limit=1) == orders[-1:]
    assert ids(status=Status.DONE, processed_status=ProcessedStatus.SUCCESS) == ["image-1"]
    assert ids(processed_status="failure", error="ValueError: not*") == [gone.key.message_id]
    assert ids(queue=app.conf.task_default_queue) == orders
    assert ids(older_than=timedelta(hours=1)) == ids(newer_than=0) == ids(queue="other") == ids(task="a\0b") == []
    assert len(ids(newer_than=timedelta(hours=1))) == 5
    assert {(row.message, row.result) for row in log.rows()} == {(None, None)}


@pytest.mark.parametrize(
    ("conditions", "says"),
    [
        ({"status": "waiting"}, r"status must be one of 'pending', 'processing', 'done', not 'waiting'"),
        ({"processed_status": "failed"}, r"processed_status must be one of .* did you mean 'failure'\?"),
        ({"limit": 0}, "limit must be a whole number of messages, 1 or more, not 0"),
        ({"limit": None}, "limit must be a whole number"),
        ({"older_than": -1}, "older_than must be a number of seconds or a timedelta, >= 0, not -1"),
        ({"newer_than": "2h"}, "newer_than must be a number of seconds"),
    ],
)
def test_a_wrong_condition_is_refused(small_app: Celery, conditions: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        queue_log(small_app).rows(**conditions)


# -- requeue -----------------------------------------------------------------------------------------------------------


def test_a_failed_message_is_requeued_and_published(app: Celery) -> None:
    log, before = queue_log(app), recorded_failure(app, "o-1")

    (listed,) = log.rows(task="fail", processed_status="failure")
    done = log.requeue(listed)

    assert done == Requeued(before.key, before.task_id, renamed=False, published=True)
    after = log.find_id("fail", before.key.message_id)
    assert after is not None
    assert (after.status, after.task_id, after.error) == (Status.PENDING, before.task_id, None)
    assert after.published_at is not None


def test_it_is_requeued_by_its_id_and_left_to_a_worker(app: Celery) -> None:
    log, before = queue_log(app), recorded_failure(app, "o-1")

    done = log.requeue("fail", before.key.message_id, publish=False)

    assert done == Requeued(before.key, before.task_id)
    assert [row.key for row in log.store.unsent(limit=9)] == [before.key]


def test_without_its_broker_it_waits_for_a_worker(
    small_app: Celery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = recorded_failure(small_app, "o-1")
    with opened_app(open_store(sqlite_store(tmp_path)), broker="redis://127.0.0.1:1/0") as away:
        away.conf.update(task_publish_retry=False, broker_transport_options={"socket_connect_timeout": 1})

        done = queue_log(away).requeue(before)

        assert (done.key, done.published) == (before.key, False)
        assert "was requeued and is not published yet; a worker will do it" in caplog.text
        assert [row.key for row in queue_log(away).store.unsent(limit=9)] == [before.key]


def test_what_is_not_requeued_says_why(app: Celery) -> None:
    log, charge = queue_log(app), app.tasks["charge"]
    charge.delay("waits")
    charge.apply(("succeeded",))
    claim(log, NewMessage(MessageKey("order:runs", "charge"), "t"))
    forgotten = recorded_failure(app, "forgotten")
    assert log.forget(forgotten)
    unknown = NewMessage(MessageKey("m", "no such task"), "t", message=b"")
    log.store.record(unknown)
    log.store.fail(claim(log, unknown), error=ABANDONED)

    for task, message_id, reason in (
        ("charge", "order:never", "there is no such message, or its row was purged; send it again"),
        ("charge", "order:waits", "it already waits"),
        ("charge", "order:succeeded", "it succeeded; to run it again, `forget` it"),
        ("charge", "order:runs", "it is running on w:1"),
        ("fail", forgotten.key.message_id, "it was forgotten, and its arguments are gone; send it again by a call"),
        ("no such task", "m", "its task is not an IdempotentTask of this app"),
    ):
        with pytest.raises(RefusedError) as caught:
            log.requeue(task, message_id)
        assert (caught.value.message_id, caught.value.task_name) == (message_id, task)
        assert reason in str(caught.value)


def test_a_row_that_has_changed_since_it_was_read_is_refused(app: Celery) -> None:
    log, before = queue_log(app), recorded_failure(app, "o-1")
    log.requeue(before)
    for change in (log.requeue, log.forget):
        with pytest.raises(RefusedError, match="it has changed in the meantime; look at it again"):
            change(before)
    now = log.find_id("fail", before.key.message_id)
    assert now is not None
    assert now.status is Status.PENDING


@pytest.mark.parametrize("arguments", [("fail",), ("fail", 7), (7, "m"), (None,)])
def test_neither_a_row_nor_an_id_is_a_type_error(small_app: Celery, arguments: tuple[Any, ...]) -> None:
    log: Any = queue_log(small_app)
    for change in (log.requeue, log.forget):
        with pytest.raises(TypeError, match=r"message id are needed|neither a task nor the name of one"):
            change(*arguments)


def test_a_row_and_an_id_are_a_type_error(small_app: Celery) -> None:
    log: Any = queue_log(small_app)
    with pytest.raises(TypeError, match="not both"):
        log.forget(recorded_failure(small_app, "o-1"), "m")


# -- forget ------------------------------------------------------------------------------------------------------------


def test_a_forgotten_id_is_free(app: Celery) -> None:
    log, charge = queue_log(app), app.tasks["charge"]
    charge.apply(("o-1", 5))

    assert log.forget(charge, "order:o-1")

    row = log.find(charge, "o-1")
    assert row is not None
    assert (row.error, row.message) == (FORGOTTEN, None)
    assert not log.forget(charge, "order:o-1")
    assert not log.forget("charge", "never")
    assert not log.forget(row)
    assert not charge.delay("o-1", 900).duplicate


def test_what_waits_or_runs_is_forgotten_by_force_only(app: Celery) -> None:
    log, charge = queue_log(app), app.tasks["charge"]
    waits = charge.delay("waits")
    runs = charge.delay("runs")
    key = MessageKey(runs.message_id, "charge")
    claimed = claim(log, NewMessage(key, runs.id))

    for message_id, reason in ((waits.message_id, "it waits to run"), (runs.message_id, "it runs")):
        with pytest.raises(RefusedError, match=f"{reason}, and a copy of it .* pass force=True"):
            log.forget("charge", message_id)
        assert log.forget("charge", message_id, force=True)
    assert not log.store.complete(claimed, result=b"late")


def test_of_a_dead_worker_it_is_forgotten_and_requeued(app: Celery) -> None:
    log = queue_log(app)
    for order in ("forgotten", "requeued"):
        result = app.tasks["fail"].delay({"id": order})
        new = NewMessage(MessageKey(result.message_id, "fail"), result.id)
        assert log.store.expire(claim(log, new))

    assert [log.forget(row) for row in log.rows(status="processing", oldest_first=True, limit=1)] == [True]
    (row,) = log.rows(status="processing")
    assert log.requeue(row).published


# -- what results say --------------------------------------------------------------------------------------------------


def said(result: Any) -> tuple[str, bool | None]:
    return result.message_id, result.duplicate


def test_each_result_of_a_call_says_its_message(small_app: Celery) -> None:
    charge, resize = small_app.tasks["charge"], small_app.tasks["resize"]
    assert said(charge.delay("o-1")) == ("order:o-1", False)
    assert said(charge.delay("o-1")) == ("order:o-1", True)
    assert said(charge.apply_async(("o-1",), message_id="mine")) == ("mine", False)
    assert said(charge.s("o-1").delay()) == ("order:o-1", True)
    assert said(charge.s("o-1").apply_async(link=resize.si(1))) == ("order:o-1", True)  # a copy, with its own Celery id
    unnamed = resize.delay(1)
    assert said(unnamed) == (unnamed.id, False)
    assert said(resize.apply_async((1,), task_id=unnamed.id)) == (unnamed.id, True)


def test_by_name_too(small_app: Celery) -> None:
    assert said(small_app.send_task("charge", ("o-1",))) == ("order:o-1", False)
    assert said(small_app.send_task("charge", ("o-1",))) == ("order:o-1", True)
    assert said(small_app.tasks["charge"].delay("o-1")) == ("order:o-1", True)
    named = small_app.send_task("resize", (1,), message_id="mine")
    assert said(named) == ("mine", False)
    assert said(signature("charge", ("o-2",), app=small_app).delay()) == ("order:o-2", False)
    assert not hasattr(small_app.send_task("plain"), "message_id")


def test_a_task_that_the_app_does_not_have_has_no_message_here(small_app: Celery) -> None:
    """Its id is made by its consumer, which knows its option."""
    assert not hasattr(small_app.send_task("another.app.s"), "duplicate")


@pytest.mark.parametrize("call", ["delay", "apply", "by an eager app"])
def test_eagerly_too(small_app: Celery, call: str) -> None:
    small_app.conf.task_always_eager = call != "delay"
    charge = small_app.tasks["charge"]
    results = [charge.apply(("o-1",)) if call == "apply" else charge.delay("o-1") for _ in range(2)]
    assert [said(result) for result in results] == [("order:o-1", False), ("order:o-1", True)]
    assert said(small_app.tasks["resize"].apply((1,), task_id="mine")) == ("mine", False)


def test_in_an_outbox_too(small_app: Celery) -> None:
    charge = small_app.tasks["charge"]
    charge.delay("o-1")
    with outbox():
        results = [charge.delay("o-1"), charge.delay("o-2")]
        assert [said(result) for result in results] == [("order:o-1", None), ("order:o-2", None)]
    assert [said(result) for result in results] == [("order:o-1", True), ("order:o-2", False)]


async def _awaited(task: Task) -> tuple[str, bool | None]:
    return said(await task.adelay("o-1"))


def test_awaited_too(small_app: Celery) -> None:
    import asyncio

    assert asyncio.run(_awaited(small_app.tasks["charge"])) == ("order:o-1", False)


def test_while_the_guard_is_off(small_app: Celery) -> None:
    @small_app.task(base=IdempotentTask, name="off", message_id="off:{x}", idempotent=False, shared=False)
    def off(x: int) -> int:
        return x

    task = small_app.tasks["off"]
    result = task.delay(1)
    assert said(result) == (result.id, False)
    assert said(task.apply_async((1,), message_id="mine")) == ("mine", False)
    assert said(task.apply((1,), task_id="t")) == ("t", False)
    by_name = small_app.send_task("off", (1,))
    assert said(by_name) == (by_name.id, False)


def test_an_error_says_it_where_there_is_no_result(small_app: Celery) -> None:
    @small_app.task(base=IdempotentTask, name="once", message_id="{x}", on_duplicate="raise", shared=False)
    def once(x: str) -> None: ...

    first = small_app.tasks["once"].delay("m")
    with pytest.raises(DuplicateMessageError) as caught:
        small_app.tasks["once"].delay("m")
    assert (caught.value.message_id, caught.value.task_id) == (first.message_id, first.id)


def test_a_result_that_is_pickled_or_made_anew_has_neither(small_app: Celery) -> None:
    """They are of the call; keep `message_id` beside the Celery id if another process needs it."""
    small_app.set_current()
    result = small_app.tasks["charge"].delay("o-1")
    for other in (pickle.loads(pickle.dumps(result)), small_app.AsyncResult(result.id)):
        assert other.id == result.id
        assert not hasattr(other, "message_id")
        assert not hasattr(other, "duplicate")
    row = queue_log(small_app).find_id("charge", result.message_id)
    assert row is not None
    assert row.task_id == result.id


def test_the_first_of_a_chain_is_recorded_by_its_id(small_app: Celery) -> None:
    """The results of a canvas are Celery's: they were made before the calls."""
    last = chain(small_app.tasks["charge"].s("o-1"), small_app.tasks["resize"].si(1), app=small_app).delay()
    assert not hasattr(last, "message_id")
    row = queue_log(small_app).find("charge", "o-1")
    assert row is not None
    assert row.task_id == last.parent.id
