"""Results: kept for replay in the app's serializer, refused in one that the app does not accept, never in the way."""

from __future__ import annotations

import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import states
from kombu.exceptions import EncodeError

from celery_idempotent import AlreadyFailedError, queue_log_table
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, ProcessedStatus, Status
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT

SUCCESS = ProcessedStatus.SUCCESS


@pytest.mark.parametrize("value", [None, 0, [], False, "", {}, 0.0, "text", [None], {"a": [1]}], ids=repr)
def test_a_result_is_replayed_as_itself(shared_worker: SharedWorker, value: Any) -> None:
    m = unique()
    first = shared_worker.task("echo").apply_async((value,), message_id=m)
    assert first.get(timeout=TIMEOUT) == value

    copy = shared_worker.deliver("echo", (value,), message_id=m)

    replayed = copy.get(timeout=TIMEOUT)
    assert (replayed, type(replayed)) == (value, type(value))
    assert copy.state == states.SUCCESS
    assert len(shared_worker.starts("echo", m)) == 1


def test_a_result_missing_in_the_backend_is_replayed(shared_worker: SharedWorker) -> None:
    """A worker that dies between the row's end and the backend's: the redelivered copy has the first one's task id."""
    m = unique()
    first = shared_worker.task("echo").apply_async(("value",), message_id=m)
    assert first.get(timeout=TIMEOUT) == "value"
    shared_worker.app.backend.delete(shared_worker.app.backend.get_key_for_task(first.id))

    copy = shared_worker.deliver("echo", ("value",), message_id=m, task_id=first.id)

    assert copy.get(timeout=TIMEOUT) == "value"
    assert len(shared_worker.starts("echo", m)) == 1


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's own
@pytest.mark.parametrize("outcome", ["success", "failure"])
def test_a_duplicate_of_an_expired_result_is_answered_from_the_row(shared_worker: SharedWorker, outcome: str) -> None:
    m, task = unique(), "echo" if outcome == "success" else "fail"
    shared_worker.task(task).apply_async(("value",), message_id=m).get(timeout=TIMEOUT, propagate=False)
    row = shared_worker.wait_until_done(task, m)
    assert row.processed_timestamp is not None
    shared_worker.app.backend.delete(shared_worker.app.backend.get_key_for_task(row.task_id))
    table, engine = queue_log_table(sa.MetaData()), sa.create_engine(shared_worker.spec.store)
    with engine.begin() as connection:
        where = (table.c.message_id == m, table.c.task_name == task)
        yesterday = row.processed_timestamp - timedelta(days=1)
        connection.execute(sa.update(table).where(*where).values(processed_timestamp=yesterday))
    engine.dispose()

    duplicate = shared_worker.task(task).apply_async(("value",), message_id=m)

    assert (duplicate.id, duplicate.duplicate) == (row.task_id, True)
    answer = duplicate.get(timeout=TIMEOUT, propagate=False)
    assert answer == "value" if outcome == "success" else isinstance(answer, AlreadyFailedError)
    assert len(shared_worker.starts(task, m)) == 1


def test_a_duplicate_does_not_store_a_result_that_is_there(shared_worker: SharedWorker) -> None:
    m, backend = unique(), shared_worker.app.backend
    first = shared_worker.task("echo").apply_async(("value",), message_id=m)
    assert first.get(timeout=TIMEOUT) == "value"
    backend.delete(backend.get_key_for_task(first.id))

    shared_worker.task("echo").apply_async(("value",), message_id=m)

    assert backend.get_state(first.id) == states.PENDING, "it has not expired: somebody has forgotten it"


def test_a_copy_leaves_its_message_the_time_to_store_its_error(shared_worker: SharedWorker) -> None:
    """Its row is written first: a copy that looks in between would store an error of its own over that."""
    m, task_id, store = unique("m"), unique("task"), shared_worker.app.queue_log.store
    claimed = store.claim(
        NewMessage(MessageKey(m, "fail"), task_id, message=b""), worker="another:1", lease=60.0, grace=0.0
    )
    assert isinstance(claimed, Claimed)
    store.fail(claimed.claim, error="ValueError: as told", unique_for=None)

    result = shared_worker.deliver("fail", message_id=m, task_id=task_id)

    shared_worker.wait_until_held("fail", m)
    shared_worker.app.backend.store_result(task_id, ValueError("as told"), states.FAILURE)
    shared_worker.wait_for_row("fail", m, lambda row: row.duplicates == 1)
    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), ValueError)
    assert shared_worker.starts("fail", m) == []


def test_a_result_that_is_not_kept_is_replayed_from_the_backend(shared_worker: SharedWorker) -> None:
    m = unique()
    first = shared_worker.task("unkept").apply_async(("value",), message_id=m)
    assert first.get(timeout=TIMEOUT) == "value"
    row = shared_worker.row("unkept", m)
    assert (row.processed_status, row.result) == (SUCCESS, None)

    copy = shared_worker.deliver("unkept", ("value",), message_id=m)

    assert copy.get(timeout=TIMEOUT) == "value"
    assert len(shared_worker.starts("unkept", m)) == 1


def test_a_result_that_is_not_kept_serves_a_canvas_all_the_same(shared_worker: SharedWorker) -> None:
    """What waits on it may have to be sent again after a crash, so it is kept until then."""
    m = unique()
    told = shared_worker.task("told")

    results = [(shared_worker.task("unkept").s("value").set(message_id=m) | told.s()).apply_async() for _ in range(2)]

    assert [result.get(timeout=TIMEOUT) for result in results] == [["value"], ["value"]]
    assert len(shared_worker.starts("unkept", m)) == 1


@pytest.mark.parametrize("task", ["unserializable", "unserializable_unkept"])
def test_a_result_that_celery_cannot_store_is_a_failure_in_both_places(shared_worker: SharedWorker, task: str) -> None:
    m = unique()

    result = shared_worker.task(task).apply_async(message_id=m)

    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), EncodeError)
    row = shared_worker.wait_until_done(task, m)
    assert (row.processed_status, row.result, row.token) == (ProcessedStatus.FAILURE, None, 1)
    assert str(row.error).startswith("kombu.exceptions.EncodeError: ")
    assert row.message is not None  # to be requeued
    shared_worker.deliver(task, message_id=m, task_id=result.id)
    shared_worker.wait_for_row(task, m, lambda row: row.duplicates == 1)
    assert len(shared_worker.starts(task, m)) == 1


def test_an_ignored_result_may_be_unserializable(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("unserializable_forgotten").apply_async(message_id=m)

    row = shared_worker.wait_until_done("unserializable_forgotten", m)
    assert (row.processed_status, row.result, row.error) == (SUCCESS, None, None)
    shared_worker.deliver("unserializable_forgotten", message_id=m, task_id=result.id)
    shared_worker.wait_for_row("unserializable_forgotten", m, lambda row: row.duplicates == 1)
    assert len(shared_worker.starts("unserializable_forgotten", m)) == 1


@pytest.mark.parametrize("same_task_id", [True, False], ids=["redelivered", "another task id"])
def test_a_copy_of_an_ignored_result_is_skipped(shared_worker: SharedWorker, same_task_id: bool) -> None:
    m = unique()
    result = shared_worker.task("forgotten").apply_async(("value",), message_id=m)
    assert shared_worker.wait_until_done("forgotten", m).processed_status is SUCCESS

    shared_worker.deliver("forgotten", ("value",), message_id=m, task_id=result.id if same_task_id else None)

    shared_worker.wait_for_row("forgotten", m, lambda row: row.duplicates == 1)
    assert len(shared_worker.starts("forgotten", m)) == 1


def test_an_ignored_result_still_serves_a_canvas(shared_worker: SharedWorker) -> None:
    m, told = unique(), shared_worker.task("told")

    results = [
        (shared_worker.task("forgotten").s("value").set(message_id=m) | told.s()).apply_async() for _ in range(2)
    ]

    assert [result.get(timeout=TIMEOUT) for result in results] == [["value"], ["value"]]
    assert len(shared_worker.starts("forgotten", m)) == 1


def test_results_ignored_for_one_call_only(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("echo").apply_async(("value",), message_id=m, ignore_result=True)

    row = shared_worker.wait_until_done("echo", m)
    assert row.processed_status is SUCCESS
    assert result.state == states.PENDING
    # One that waits for the result is served from the row.
    assert shared_worker.deliver("echo", ("value",), message_id=m).get(timeout=TIMEOUT) == "value"
    assert len(shared_worker.starts("echo", m)) == 1


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def put_result(shared_worker: SharedWorker, task: str, message_id: str, result: bytes) -> None:
    """Write over a row's result, as one who has the database's password can."""
    engine = sa.create_engine(shared_worker.spec.store)
    with engine.begin() as connection:
        changed = connection.execute(
            sa.text("UPDATE queue_log SET result = :result WHERE message_id = :m AND task_name = :task"),
            {"result": result, "m": message_id, "task": task},
        )
        assert changed.rowcount == 1
    engine.dispose()


@pytest.mark.parametrize("head", [b"application/x-python-serialize;binary\n", b"no/such-type;binary\n", b""])
def test_a_row_is_not_unpickled_unless_the_app_accepts_pickle(shared_worker: SharedWorker, head: bytes) -> None:
    m, sprung = unique(), shared_worker.path("sprung")
    assert shared_worker.task("echo").apply_async(("value",), message_id=m).get(timeout=TIMEOUT) == "value"
    put_result(shared_worker, "echo", m, head + pickle.dumps(Trap(sprung)))

    copy = shared_worker.deliver("echo", ("value",), message_id=m)

    # The backend still has the first one's result, which the row's stands in for.
    assert copy.get(timeout=TIMEOUT) == "value"
    assert not Path(sprung).exists()
    assert len(shared_worker.starts("echo", m)) == 1
    assert shared_worker.row("echo", m).status is Status.DONE


@pytest.mark.parametrize("damaged", [b"application/json;utf-8\n{", b"\xff\n1", b"", b"\n1"])
def test_a_damaged_result_does_not_run_the_body_again(shared_worker: SharedWorker, damaged: bytes) -> None:
    m = unique()
    assert shared_worker.task("echo").apply_async(("value",), message_id=m).get(timeout=TIMEOUT) == "value"
    put_result(shared_worker, "echo", m, damaged)

    copy = shared_worker.deliver("echo", ("value",), message_id=m)

    assert copy.get(timeout=TIMEOUT) == "value"
    assert len(shared_worker.starts("echo", m)) == 1
