"""What runs past the guard, as the documentation says: direct calls, and the maps that call the body themselves."""

from __future__ import annotations

from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import TIMEOUT


def test_a_direct_call_runs_each_time(shared_worker: SharedWorker) -> None:
    task, order = shared_worker.task("order"), unique("order")

    assert [task(order), task(order), task.run(order)] == [{"order": order, "amount": 1}] * 3

    assert shared_worker.find("order", f"order:{order}") is None


def test_a_direct_call_of_a_failing_task_raises_its_error(shared_worker: SharedWorker) -> None:
    before = shared_worker.app.queue_log.store.counts()
    try:
        shared_worker.task("fail")("here")
    except ValueError as error:
        assert str(error) == "here"  # noqa: PT017 - the traceback must not come from a guard
    else:
        raise AssertionError("it did not fail")
    assert shared_worker.app.queue_log.store.counts() == before


def test_map_starmap_and_chunks_run_each_of_their_items(shared_worker: SharedWorker) -> None:
    add, echo, value = shared_worker.task("add"), shared_worker.task("echo"), unique("value")

    mapped = echo.map([value, value]).delay()
    starred = add.starmap([(1, 2), (1, 2)]).delay()
    chunked = add.chunks([(1, 2), (1, 2), (3, 4)], 2).delay()

    assert mapped.get(timeout=TIMEOUT) == [value, value]
    assert starred.get(timeout=TIMEOUT) == [3, 3]
    assert chunked.get(timeout=TIMEOUT) == [[3, 3], [7]]
    for result in (mapped, starred, *chunked.children):
        assert shared_worker.find("add", result.id) is None


def test_a_task_called_as_a_function_has_its_own_request(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("calls_another").apply_async((m,), message_id=m)

    direct = {"id": None, "called_directly": True}
    assert result.get(timeout=TIMEOUT) == {"mine": result.id, "theirs": [direct, direct]}
    assert shared_worker.row("calls_another", m).token == 1
    assert shared_worker.find("tells_request", m) is None
    assert shared_worker.find("tells_request", result.id) is None


def test_a_body_calling_its_own_task_is_one_run(shared_worker: SharedWorker) -> None:
    m = unique()

    result = shared_worker.task("factorial").apply_async((5,), message_id=m)

    assert result.get(timeout=TIMEOUT) == 120
    assert len(shared_worker.ledger.starts("factorial", task_id=result.id)) == 5
    row = shared_worker.row("factorial", m)
    assert (row.token, row.attempt, row.duplicates) == (1, 0, 0)
