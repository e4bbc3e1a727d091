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
from celery_idempotent.core.records import ProcessedStatus, Status
from tests.support.bench import PATIENCE, Bench

SUCCESS = ProcessedStatus.SUCCESS


@pytest.mark.parametrize("value", [None, 0, [], False, "", {}, 0.0, "text", [None], {"a": [1]}], ids=repr)
def test_a_result_is_replayed_as_itself(bench: Bench, value: Any) -> None:
    m = bench.fresh()
    first = bench.task("echo").apply_async((value,), message_id=m)
    assert first.get(timeout=PATIENCE) == value

    copy = bench.deliver("echo", (value,), message_id=m)

    replayed = copy.get(timeout=PATIENCE)
    assert (replayed, type(replayed)) == (value, type(value))
    assert copy.state == states.SUCCESS
    assert len(bench.starts("echo", m)) == 1


def test_a_result_that_never_reached_the_backend_is_replayed_to_its_own_task(bench: Bench) -> None:
    """A worker that dies between the row's end and the backend's: the redelivered copy has the first one's task id."""
    m = bench.fresh()
    first = bench.task("echo").apply_async(("value",), message_id=m)
    assert first.get(timeout=PATIENCE) == "value"
    bench.app.backend.delete(bench.app.backend.get_key_for_task(first.id))

    copy = bench.deliver("echo", ("value",), message_id=m, task_id=first.id)

    assert copy.get(timeout=PATIENCE) == "value"
    assert len(bench.starts("echo", m)) == 1


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's own
@pytest.mark.parametrize("outcome", ["success", "failure"])
def test_a_duplicate_of_an_expired_result_is_answered_from_the_row(bench: Bench, outcome: str) -> None:
    m, task = bench.fresh(), "echo" if outcome == "success" else "fail"
    bench.task(task).apply_async(("value",), message_id=m).get(timeout=PATIENCE, propagate=False)
    row = bench.done(task, m)
    assert row.processed_timestamp is not None
    bench.app.backend.delete(bench.app.backend.get_key_for_task(row.task_id))
    table, engine = queue_log_table(sa.MetaData()), sa.create_engine(bench.spec.store)
    with engine.begin() as connection:
        where = (table.c.message_id == m, table.c.task_name == task)
        yesterday = row.processed_timestamp - timedelta(days=1)
        connection.execute(sa.update(table).where(*where).values(processed_timestamp=yesterday))
    engine.dispose()

    duplicate = bench.task(task).apply_async(("value",), message_id=m)

    assert (duplicate.id, duplicate.duplicate) == (row.task_id, True)
    answer = duplicate.get(timeout=PATIENCE, propagate=False)
    assert answer == "value" if outcome == "success" else isinstance(answer, AlreadyFailedError)
    assert len(bench.starts(task, m)) == 1


def test_a_duplicate_does_not_store_a_result_that_is_there(bench: Bench) -> None:
    m, backend = bench.fresh(), bench.app.backend
    first = bench.task("echo").apply_async(("value",), message_id=m)
    assert first.get(timeout=PATIENCE) == "value"
    backend.delete(backend.get_key_for_task(first.id))

    bench.task("echo").apply_async(("value",), message_id=m)

    assert backend.get_state(first.id) == states.PENDING, "it has not expired: somebody has forgotten it"


def test_a_result_that_is_not_kept_is_replayed_from_the_backend(bench: Bench) -> None:
    m = bench.fresh()
    first = bench.task("unkept").apply_async(("value",), message_id=m)
    assert first.get(timeout=PATIENCE) == "value"
    row = bench.row("unkept", m)
    assert (row.processed_status, row.result) == (SUCCESS, None)

    copy = bench.deliver("unkept", ("value",), message_id=m)

    assert copy.get(timeout=PATIENCE) == "value"
    assert len(bench.starts("unkept", m)) == 1


def test_a_result_that_is_not_kept_serves_a_canvas_all_the_same(bench: Bench) -> None:
    """What waits on it may have to be sent again after a crash, so it is kept until then."""
    m = bench.fresh()
    told = bench.task("told")

    results = [(bench.task("unkept").s("value").set(message_id=m) | told.s()).apply_async() for _ in range(2)]

    assert [result.get(timeout=PATIENCE) for result in results] == [["value"], ["value"]]
    assert len(bench.starts("unkept", m)) == 1


@pytest.mark.parametrize("task", ["unserializable", "unserializable_unkept"])
def test_a_result_that_celery_cannot_store_is_a_failure_in_both_places(bench: Bench, task: str) -> None:
    m = bench.fresh()

    result = bench.task(task).apply_async(message_id=m)

    assert isinstance(result.get(timeout=PATIENCE, propagate=False), EncodeError)
    row = bench.done(task, m)
    assert (row.processed_status, row.result, row.token) == (ProcessedStatus.FAILURE, None, 1)
    assert str(row.error).startswith("kombu.exceptions.EncodeError: ")
    assert row.message is not None  # to be requeued
    bench.deliver(task, message_id=m, task_id=result.id)
    bench.wait_for_row(task, m, lambda row: row.duplicates == 1)
    assert len(bench.starts(task, m)) == 1


def test_an_unserializable_result_that_is_ignored_is_nobodys_affair(bench: Bench) -> None:
    m = bench.fresh()

    result = bench.task("unserializable_forgotten").apply_async(message_id=m)

    row = bench.done("unserializable_forgotten", m)
    assert (row.processed_status, row.result, row.error) == (SUCCESS, None, None)
    bench.deliver("unserializable_forgotten", message_id=m, task_id=result.id)
    bench.wait_for_row("unserializable_forgotten", m, lambda row: row.duplicates == 1)
    assert len(bench.starts("unserializable_forgotten", m)) == 1


@pytest.mark.parametrize("same_task_id", [True, False], ids=["redelivered", "another task id"])
def test_a_copy_of_an_ignored_result_is_skipped(bench: Bench, same_task_id: bool) -> None:
    m = bench.fresh()
    result = bench.task("forgotten").apply_async(("value",), message_id=m)
    assert bench.done("forgotten", m).processed_status is SUCCESS

    bench.deliver("forgotten", ("value",), message_id=m, task_id=result.id if same_task_id else None)

    bench.wait_for_row("forgotten", m, lambda row: row.duplicates == 1)
    assert len(bench.starts("forgotten", m)) == 1


def test_an_ignored_result_still_serves_a_canvas(bench: Bench) -> None:
    m, told = bench.fresh(), bench.task("told")

    results = [(bench.task("forgotten").s("value").set(message_id=m) | told.s()).apply_async() for _ in range(2)]

    assert [result.get(timeout=PATIENCE) for result in results] == [["value"], ["value"]]
    assert len(bench.starts("forgotten", m)) == 1


def test_results_ignored_for_one_call_only(bench: Bench) -> None:
    m = bench.fresh()

    result = bench.task("echo").apply_async(("value",), message_id=m, ignore_result=True)

    row = bench.done("echo", m)
    assert row.processed_status is SUCCESS
    assert result.state == states.PENDING
    # One that waits for the result is served from the row.
    assert bench.deliver("echo", ("value",), message_id=m).get(timeout=PATIENCE) == "value"
    assert len(bench.starts("echo", m)) == 1


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def put_result(bench: Bench, task: str, message_id: str, result: bytes) -> None:
    """Write over a row's result, as one who has the database's password can."""
    engine = sa.create_engine(bench.spec.store)
    with engine.begin() as connection:
        changed = connection.execute(
            sa.text("UPDATE queue_log SET result = :result WHERE message_id = :m AND task_name = :task"),
            {"result": result, "m": message_id, "task": task},
        )
        assert changed.rowcount == 1
    engine.dispose()


@pytest.mark.parametrize("head", [b"application/x-python-serialize;binary\n", b"no/such-type;binary\n", b""])
def test_a_row_is_not_unpickled_unless_the_app_accepts_pickle(bench: Bench, head: bytes) -> None:
    m, sprung = bench.fresh(), bench.path("sprung")
    assert bench.task("echo").apply_async(("value",), message_id=m).get(timeout=PATIENCE) == "value"
    put_result(bench, "echo", m, head + pickle.dumps(Trap(sprung)))

    copy = bench.deliver("echo", ("value",), message_id=m)

    # The backend still has the first one's result, which the row's stands in for.
    assert copy.get(timeout=PATIENCE) == "value"
    assert not Path(sprung).exists()
    assert len(bench.starts("echo", m)) == 1
    assert bench.row("echo", m).status is Status.DONE


@pytest.mark.parametrize("damaged", [b"application/json;utf-8\n{", b"\xff\n1", b"", b"\n1"])
def test_a_damaged_result_does_not_run_the_body_again(bench: Bench, damaged: bytes) -> None:
    m = bench.fresh()
    assert bench.task("echo").apply_async(("value",), message_id=m).get(timeout=PATIENCE) == "value"
    put_result(bench, "echo", m, damaged)

    copy = bench.deliver("echo", ("value",), message_id=m)

    assert copy.get(timeout=PATIENCE) == "value"
    assert len(bench.starts("echo", m)) == 1
