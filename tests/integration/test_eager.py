"""Eager mode and ``apply()``: no broker and no worker, the same guard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group, states
from celery.app.trace import build_tracer
from celery.local import PromiseProxy

from celery_idempotent import (
    AlreadyFailedError,
    AlreadyProcessingError,
    ConfigurationError,
    DuplicateMessageError,
    MessageMismatchError,
)
from celery_idempotent.core.records import MessageKey, ProcessedStatus, Row, Status
from celery_idempotent.worker.lease_renewal import LeaseRenewer
from tests.integration.conftest import TASKS
from tests.support.apps import AppSpec, close_app
from tests.support.ledger import Ledger
from tests.support.stores import sqlite_store

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE


@pytest.fixture
def app(tmp_path: Path, ledger: Ledger) -> Iterator[Celery]:
    """Yield an app that runs everything where it is called."""
    spec = AppSpec(
        broker="memory://",
        backend="cache+memory://",
        store=sqlite_store(tmp_path),
        queue="eager",
        ledger=str(ledger.path),
        tasks=TASKS,
        settings={"task_always_eager": True},
    )
    app = spec.build()
    app.finalize()
    yield app
    close_app(app)


def row(app: Celery, task: str, message_id: str) -> Row:
    found: Row | None = app.queue_log.store.find(MessageKey(message_id, task))
    assert found is not None, f"no row for {task}[{message_id}]"
    return found


def test_a_success(app: Celery, ledger: Ledger) -> None:
    result = app.tasks["add"].apply_async((1, 2), message_id="m")

    assert (result.get(), result.state, result.duplicate) == (3, states.SUCCESS, False)
    done = row(app, "add", "m")
    assert (done.status, done.processed_status, done.token, done.attempt) == (Status.DONE, SUCCESS, 1, 0)
    assert (done.task_id, done.message, done.error, done.queue) == (result.id, None, None, None)
    assert len(ledger.starts("add")) == 1


@pytest.mark.parametrize("value", [None, 0, [], False, "", {"a": [1]}], ids=repr)
def test_a_duplicate_gets_the_first_result(app: Celery, ledger: Ledger, value: Any) -> None:
    first = app.tasks["echo"].apply_async((value,), message_id="m")

    second = app.tasks["echo"].apply_async((value,), message_id="m")

    assert (second.id, second.duplicate, second.state) == (first.id, True, states.SUCCESS)
    assert (second.get(), type(second.get())) == (value, type(value))
    assert len(ledger.starts("echo")) == 1
    assert row(app, "echo", "m").duplicates == 1


def test_the_tasks_options_count(app: Celery, ledger: Ledger) -> None:
    assert app.tasks["order.raise"].delay("o-1", 5).get() == {"order": "o-1", "amount": 5}

    with pytest.raises(DuplicateMessageError):
        app.tasks["order.raise"].delay("o-1", 5)
    with pytest.raises(MessageMismatchError):
        app.tasks["order.raise"].delay("o-1", 6)

    assert len(ledger.starts("order.raise")) == 1


def test_an_app_whose_tasks_are_all_guarded(tmp_path: Path) -> None:
    app = Celery("guarded", task_cls="celery_idempotent:IdempotentTask", broker="memory://", set_as_current=False)
    app.conf.update(task_always_eager=True, idempotent_store=sqlite_store(tmp_path), result_backend="cache+memory://")
    runs = []

    @app.task(message_id="double:{n}")
    def double(n: int) -> int:
        runs.append(n)
        return 2 * n

    @app.task
    def total(values: list[int]) -> int:
        return sum(values)

    assert [double.delay(1).get(), double.delay(n=1).get()] == [2, 2]
    assert chord([double.s(1), double.s(2)], total.s(), app=app).apply_async().get() == 6
    assert runs == [1, 2]
    close_app(app)


def test_without_an_id_each_call_runs(app: Celery, ledger: Ledger) -> None:
    results = [app.tasks["add"].delay(1, 2) for _ in range(2)]

    assert [result.get() for result in results] == [3, 3]
    assert len(ledger.starts("add")) == 2
    assert [row(app, "add", result.id).processed_status for result in results] == [SUCCESS, SUCCESS]


def test_a_failure(app: Celery, ledger: Ledger) -> None:
    first = app.tasks["fail"].apply_async(message_id="m")

    assert first.state == states.FAILURE
    with pytest.raises(ValueError, match="as told"):
        first.get()
    done = row(app, "fail", "m")
    assert (done.status, done.processed_status, done.error) == (Status.DONE, FAILURE, "ValueError: as told")
    assert len(ledger.starts("fail")) == 1


def test_a_duplicate_of_a_failure_fails_too(app: Celery, ledger: Ledger) -> None:
    first = app.tasks["fail"].apply_async(message_id="m")

    second = app.tasks["fail"].apply_async(message_id="m")

    assert (second.id, second.duplicate, second.state) == (first.id, True, states.FAILURE)
    with pytest.raises(AlreadyFailedError, match="ValueError: as told"):
        second.get()
    assert len(ledger.starts("fail")) == 1


def test_errors_propagate_where_the_app_says_so(app: Celery) -> None:
    app.conf.task_eager_propagates = True

    with pytest.raises(ValueError, match="as told"):
        app.tasks["fail"].apply_async(message_id="m")

    assert row(app, "fail", "m").processed_status is FAILURE


def test_a_failed_message_is_run_again_where_the_task_says_so(app: Celery, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    assert app.tasks["order.again"].delay("o-1", str(flag)).state == states.FAILURE
    flag.touch()

    second = app.tasks["order.again"].delay("o-1", str(flag))

    assert (second.get(), second.duplicate) == ("o-1 at last", False)
    assert row(app, "order.again", "order:o-1").token == 2


@pytest.mark.parametrize(("task", "args"), [("retry_n", (2, 0)), ("autoretry", (2,)), ("mutate", ([], 2))])
def test_retries_are_runs_of_one_row(app: Celery, ledger: Ledger, task: str, args: tuple[Any, ...]) -> None:
    result = app.tasks[task].apply_async(args, message_id="m")

    assert result.get() == (["run 0", "run 1", "run 2"] if task == "mutate" else 2)
    assert [start.retries for start in ledger.starts(task)] == [0, 1, 2]
    done = row(app, task, "m")
    assert (done.status, done.processed_status, done.attempt, done.token) == (Status.DONE, SUCCESS, 2, 3)
    assert app.tasks[task].apply_async(args, message_id="m").duplicate


@pytest.mark.parametrize("way", ["apply", "delay"])
def test_a_retry_that_is_returned_runs(app: Celery, ledger: Ledger, way: str) -> None:
    """``return self.retry(throw=False)``: callbacks are sent after the last attempt."""
    task, link = app.tasks["retry_returned"], app.tasks["told"].s()
    send = task.apply if way == "apply" else task.apply_async

    result = send((2,), message_id="m", link=link)

    assert (result.get(), result.state) == (2, states.SUCCESS)
    assert [start.retries for start in ledger.starts("retry_returned")] == [0, 1, 2]
    assert [done.detail for done in ledger.entries(task="told") if done.event == "start"] == [None]
    done = row(app, "retry_returned", "m")
    assert (done.processed_status, done.attempt, done.token) == (SUCCESS, 2, 3)


def test_retries_that_are_used_up_fail(app: Celery, ledger: Ledger) -> None:
    result = app.tasks["give_up"].apply_async((True,), message_id="m")

    assert isinstance(result.result, ValueError)
    assert len(ledger.starts("give_up")) == 3
    assert (row(app, "give_up", "m").processed_status, row(app, "give_up", "m").attempt) == (FAILURE, 2)


def test_ignore_and_reject_end_the_row(app: Celery) -> None:
    assert app.tasks["ignored"].apply_async(message_id="m").state == states.IGNORED
    assert app.tasks["rejected"].apply_async(message_id="m").state == states.REJECTED

    ignored, rejected = row(app, "ignored", "m"), row(app, "rejected", "m")
    assert (ignored.status, ignored.processed_status, ignored.error) == (Status.DONE, SUCCESS, "ignored")
    assert (rejected.status, rejected.processed_status) == (Status.DONE, FAILURE)


def test_a_message_that_is_given_back_frees_its_id(app: Celery, tmp_path: Path) -> None:
    """No broker brings it back."""
    task = app.tasks["requeued"]

    rejected = task.apply_async((str(tmp_path / "flag"),), message_id="m")

    given_back = row(app, "requeued", "m")
    assert rejected.state == states.REJECTED
    assert (given_back.status, given_back.processed_status, given_back.expired) == (Status.DONE, FAILURE, True)
    assert "no broker" in str(given_back.error)
    assert task.apply_async((str(tmp_path / "flag"),), message_id="m").get() == "the second time"
    assert row(app, "requeued", "m").processed_status is SUCCESS


@pytest.mark.parametrize("kind", ["guarded", "identified", "plain"])
def test_a_replaced_task_runs_its_replacement(app: Celery, ledger: Ledger, kind: str) -> None:
    # With `apply`: from `apply_async`, Celery refuses to wait for the replacement.
    result = app.tasks["replace_by"].apply((kind,), message_id="m")

    assert result.get() == 3
    assert row(app, "replace_by", "m").processed_status is SUCCESS
    assert app.tasks["replace_by"].apply((kind,), message_id="m").get() == 3
    assert len(ledger.starts("replace_by")) == 1


@pytest.mark.parametrize(
    ("task", "args", "message_id"),
    [("replace_by_itself", (2,), None), ("countdown_by_name", ("x", 2), "countdown:x")],
)
def test_a_task_replaced_by_itself(
    app: Celery, ledger: Ledger, task: str, args: tuple[Any, ...], message_id: str | None
) -> None:
    result = app.tasks[task].apply(args)

    assert result.get() == "zero"
    assert len(ledger.starts(task)) == 3
    done = row(app, task, message_id or result.id)
    assert (done.status, done.processed_status, done.token) == (Status.DONE, SUCCESS, 3)


def test_a_task_replaced_by_itself_that_fails(app: Celery) -> None:
    result = app.tasks["countdown_by_name"].apply(("x", 1, True))

    assert isinstance(result.result, ValueError)
    done = row(app, "countdown_by_name", "countdown:x")
    assert (done.status, done.processed_status, done.error) == (Status.DONE, FAILURE, "ValueError: zero")


def test_calls_from_inside_a_body(app: Celery, ledger: Ledger) -> None:
    result = app.tasks["nests"].apply_async(("inner",), message_id="outer")

    assert result.get() == [3, 3]
    assert (len(ledger.starts("nests")), len(ledger.starts("add"))) == (1, 1)
    assert (row(app, "nests", "outer").token, row(app, "add", "inner").duplicates) == (1, 1)


def test_a_call_of_the_message_that_is_running(app: Celery) -> None:
    """Nothing can be held in one process: the caller, who is the owner, gets a duplicate that is still pending."""
    result = app.tasks["calls_itself"].apply_async(("m",), message_id="m")

    assert result.get() == [True, states.PENDING, "NoneType"]
    assert row(app, "calls_itself", "m").processed_status is SUCCESS


# -- canvas -----------------------------------------------------------------------------------------------------------------


def test_a_chain_with_a_duplicate(app: Celery, ledger: Ledger) -> None:
    add = app.tasks["add"]

    results = [chain(add.s(1, 1), add.s(2).set(message_id="m"), add.s(3), app=app).apply_async() for _ in range(2)]

    assert [result.get() for result in results] == [7, 7]
    assert len(ledger.starts("add")) == 5


@pytest.mark.parametrize("frozen", ["chain", "in a group", "prepared"])
def test_each_step_of_a_frozen_chain_runs(app: Celery, ledger: Ledger, frozen: str) -> None:
    """Celery gives its steps one id, that of the chain."""
    add = app.tasks["add"]
    steps = chain(add.si(1, 1), add.s(1), add.s(1), add.si(1, 1), add.si(1, 1), app=app)
    match frozen:
        case "chain":
            steps.freeze()
            assert steps.apply_async().get() == 2
        case "in a group":
            assert group(steps, app=app).apply_async().get() == [2]
        case "prepared":
            steps.prepare_steps((), {}, steps.tasks)
            assert steps.apply_async().get() == 2

    assert len(ledger.starts("add")) == 5


def test_a_frozen_chain_that_is_applied_twice_runs_once(app: Celery, ledger: Ledger) -> None:
    add = app.tasks["add"]
    steps = chain(add.si(1, 1), add.s(1), add.s(1), app=app)
    steps.freeze()

    assert [steps.apply_async().get() for _ in range(2)] == [4, 4]
    assert len(ledger.starts("add")) == 3


def test_a_tracer_may_name_the_message_to_the_hooks_only(app: Celery) -> None:
    add = app.tasks["add"]
    trace = build_tracer(add.name, add, app=app, eager=True)

    assert trace("id", (1, 2), {}).retval == 3
    assert row(app, "add", "id").status is Status.DONE


def test_the_lease_of_a_proxied_task_is_released(app: Celery) -> None:
    add = PromiseProxy(lambda: app.tasks["add"])
    trace = build_tracer(add.name, add, app=app, eager=True)

    assert trace("id", (1, 2), {}).retval == 3
    assert LeaseRenewer.of(app.queue_log).held() == []


def test_a_group_with_a_duplicate(app: Celery, ledger: Ledger) -> None:
    add = app.tasks["add"]

    results = [group([add.s(1, 2), add.s(3, 4).set(message_id="m")], app=app).apply_async() for _ in range(2)]

    assert [result.get() for result in results] == [[3, 7], [3, 7]]
    assert len(ledger.starts("add")) == 3


def test_a_chord_with_duplicates(app: Celery, ledger: Ledger) -> None:
    add, told = app.tasks["add"], app.tasks["told"]

    results = [
        chord([add.s(1, 2), add.s(3, 4).set(message_id="m")], told.s().set(message_id="body"), app=app).apply_async()
        for _ in range(2)
    ]

    assert [result.get() for result in results] == [[[3, 7]], [[3, 7]]]
    assert (len(ledger.starts("add")), len(ledger.starts("told"))) == (3, 1)


@pytest.mark.parametrize(
    ("kind", "runs"),
    [("one", 1), ("three alike", 3), ("raising", 1), ("linked", 3), ("group", 2), ("chain", 4), ("chord", 3)],
)
def test_calls_of_a_body(app: Celery, ledger: Ledger, kind: str, runs: int) -> None:
    result = app.tasks["parent"].apply_async((kind, "name"), message_id="m")

    assert result.state == states.SUCCESS
    assert len([note for note in ledger.entries() if note.task.startswith("child")]) == runs


def test_a_retry_calls_again(app: Celery, ledger: Ledger) -> None:
    app.tasks["parent"].apply_async(("one", "name", "", 2), message_id="m")

    assert len(ledger.entries(task="child")) == 3


def test_links_run_once(app: Celery, ledger: Ledger) -> None:
    echo, told = app.tasks["echo"], app.tasks["told"]

    for _ in range(2):
        echo.apply_async(("value",), message_id="m", link=told.s("mine"))
        echo.apply_async(("value",), link=told.s("ours").set(message_id="once"))

    assert len(ledger.starts("echo")) == 3
    assert row(app, "echo", "m").processed_status is SUCCESS
    assert len(ledger.starts("told")) == 3  # one for each of the two callers, and one that they share


# -- apply() ----------------------------------------------------------------------------------------------------------------


def test_apply_is_guarded_by_its_id(app: Celery, ledger: Ledger) -> None:
    app.conf.task_always_eager = False
    echo = app.tasks["echo"]

    results = [echo.apply(("value",), message_id="m") for _ in range(2)]

    assert [result.get() for result in results] == ["value", "value"]
    assert len(ledger.starts("echo")) == 1
    done = row(app, "echo", "m")
    assert (done.processed_status, done.task_id, done.duplicates) == (SUCCESS, results[0].id, 1)


@pytest.mark.parametrize("backend", ["cache+memory://", "disabled://"])
def test_apply_of_a_finished_message_answers_as_delay_does(app: Celery, tmp_path: Path, backend: str) -> None:
    app.conf.update(result_backend=backend)
    echo, raising = app.tasks["echo"], app.tasks["order.raise"]
    first = echo.apply(("value",), message_id="m")

    for second in (echo.apply(("value",), message_id="m"), echo.apply_async(("value",), message_id="m")):
        assert (second.id, second.state, second.get(), second.duplicate) == (first.id, states.SUCCESS, "value", True)
    assert not first.duplicate
    raising.apply(("o-1",))
    for call in (raising.apply, raising.apply_async):
        with pytest.raises(DuplicateMessageError):
            call(("o-1",))


def test_apply_makes_the_id_from_the_tasks_option(app: Celery, ledger: Ledger) -> None:
    order = app.tasks["order"]

    assert [order.apply(("o-1",)).get() for _ in range(2)] == [{"order": "o-1", "amount": 1}] * 2
    assert isinstance(order.apply(("o-1", 2)).result, MessageMismatchError)

    assert len(ledger.starts("order")) == 1


def test_apply_without_an_id_runs_each_time(app: Celery, ledger: Ledger) -> None:
    results = [app.tasks["add"].apply((1, 2)) for _ in range(2)]

    assert [result.get() for result in results] == [3, 3]
    assert len(ledger.starts("add")) == 2
    assert row(app, "add", results[1].id).processed_status is SUCCESS


def test_apply_of_a_failed_message_raises_the_first_error(app: Celery, ledger: Ledger) -> None:
    first, second = (app.tasks["fail"].apply(message_id="m") for _ in range(2))

    assert (first.state, second.state) == (states.FAILURE, states.FAILURE)
    assert isinstance(first.result, ValueError)
    assert isinstance(second.result, AlreadyFailedError)
    assert len(ledger.starts("fail")) == 1


def test_apply_of_a_running_message_is_refused(app: Celery) -> None:
    result = app.tasks["calls_itself"].apply(("m", True), message_id="m")

    assert result.get() == [False, states.FAILURE, AlreadyProcessingError.__name__]


@pytest.mark.parametrize("message_id", [None, "m"])
def test_apply_takes_and_gives_what_no_serializer_does(app: Celery, ledger: Ledger, message_id: str | None) -> None:
    """As in a unit test, with a stub for an argument."""
    stub = object()
    options = {} if message_id is None else {"message_id": message_id}

    result = app.tasks["stubbed"].apply((stub,), **options)

    assert result.get() is stub
    assert [start.retries for start in ledger.starts("stubbed")] == [0, 1]
    assert row(app, "stubbed", message_id or result.id).processed_status is SUCCESS


def test_apply_with_a_wrong_id_is_refused(app: Celery, ledger: Ledger) -> None:
    with pytest.raises(ConfigurationError, match="message"):
        app.tasks["echo"].apply((1,), message_id="")

    assert ledger.starts() == []
