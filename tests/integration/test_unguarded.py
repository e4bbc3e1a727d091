"""What runs past the guard, as the documentation says: direct calls, and the maps that call the body themselves."""

from __future__ import annotations

from tests.support.bench import PATIENCE, Bench


def test_a_direct_call_runs_each_time(bench: Bench) -> None:
    task, order = bench.task("order"), bench.fresh("order")

    assert [task(order), task(order), task.run(order)] == [{"order": order, "amount": 1}] * 3

    assert bench.find("order", f"order:{order}") is None


def test_a_direct_call_of_a_failing_task_raises_its_error(bench: Bench) -> None:
    before = bench.app.queue_log.store.counts()
    try:
        bench.task("fail")("here")
    except ValueError as error:
        assert str(error) == "here"  # noqa: PT017 - the traceback must not come from a guard
    else:
        raise AssertionError("it did not fail")
    assert bench.app.queue_log.store.counts() == before


def test_map_starmap_and_chunks_run_each_of_their_items(bench: Bench) -> None:
    add, echo, value = bench.task("add"), bench.task("echo"), bench.fresh("value")

    mapped = echo.map([value, value]).delay()
    starred = add.starmap([(1, 2), (1, 2)]).delay()
    chunked = add.chunks([(1, 2), (1, 2), (3, 4)], 2).delay()

    assert mapped.get(timeout=PATIENCE) == [value, value]
    assert starred.get(timeout=PATIENCE) == [3, 3]
    assert chunked.get(timeout=PATIENCE) == [[3, 3], [7]]
    for result in (mapped, starred, *chunked.children):
        assert bench.find("add", result.id) is None


def test_a_task_that_another_one_calls_as_a_function_has_a_request_of_its_own(bench: Bench) -> None:
    m = bench.fresh()

    result = bench.task("calls_another").apply_async((m,), message_id=m)

    direct = {"id": None, "called_directly": True}
    assert result.get(timeout=PATIENCE) == {"mine": result.id, "theirs": [direct, direct]}
    assert bench.row("calls_another", m).token == 1
    assert bench.find("tells_request", m) is None
    assert bench.find("tells_request", result.id) is None


def test_a_body_that_calls_its_own_task_as_a_function_is_one_run(bench: Bench) -> None:
    m = bench.fresh()

    result = bench.task("factorial").apply_async((5,), message_id=m)

    assert result.get(timeout=PATIENCE) == 120
    assert len(bench.ledger.starts("factorial", task_id=result.id)) == 5
    row = bench.row("factorial", m)
    assert (row.token, row.attempt, row.duplicates) == (1, 0, 0)
