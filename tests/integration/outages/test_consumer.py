"""A worker whose store goes away: it waits, puts back what it cannot claim, and no message is lost or run twice for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult
from sqlalchemy import NullPool, create_engine, text

from celery_idempotent import StoreUnavailableError
from celery_idempotent.core.records import MessageKey, ProcessedStatus, Row, RowFilter, Status
from tests.conftest import StartWorker
from tests.support.apps import AppSpec, OpenApp
from tests.support.ledger import Ledger
from tests.support.proxy import Proxy
from tests.support.servers import PrivatePostgreSQL
from tests.support.waiting import wait_until
from tests.support.worker import WorkerProcess

StartImpatient = Callable[..., WorkerProcess]

early_and_late = pytest.mark.parametrize("task", ["echo", "late"], ids=["early ack", "late ack"])

#: What a worker says of an outage: that it puts a message back, or that it must wait for an answer.
PUTS_BACK, WAITS = "is delivered again in 1 s", "asking again until the store answers"


def wait_for_log(worker: WorkerProcess, *texts: str, count: int = 1) -> None:
    """Wait until a worker's log has any of the texts, so many times in all."""
    wait_until(
        lambda: sum(worker.log.read_text(errors="replace").count(text) for text in texts) >= count,
        timeout=60,
        describe=lambda: f"{count} of {texts} from {worker.hostname}:\n{worker.log_tail()}",
    )


def row_of(app: Celery, message_id: str, task: str) -> Row:
    row: Row | None = app.queue_log.store.find(MessageKey(message_id, task))
    assert row is not None
    return row


def done(app: Celery, task: str) -> int:
    """How many of a task's messages are done."""
    return sum(1 for _ in app.queue_log.store.rows(RowFilter(task_name=task, status=Status.DONE, limit=1000)))


def assert_ran_once_each(app: Celery, ledger: Ledger, task: str, message_ids: list[str]) -> None:
    """Check that ledger, table and broker agree: one run of each, nothing left over."""
    assert sorted(note.message_id or "" for note in ledger.starts(task)) == sorted(message_ids)
    assert sorted(note.message_id or "" for note in ledger.ends(task)) == sorted(message_ids)
    rows = list(app.queue_log.store.rows(RowFilter(task_name=task, limit=1000)))
    assert sorted(row.key.message_id for row in rows) == sorted(message_ids)
    assert {(row.status, row.processed_status) for row in rows} == {(Status.DONE, ProcessedStatus.SUCCESS)}
    assert app.backend.client.llen(app.conf.task_default_queue) == 0


class Caller:
    """Sends messages one after the other, each until it is accepted, even while the store is away."""

    def __init__(self, app: Celery, task: str) -> None:
        self.app = app
        self.task = task
        self.results: dict[str, AsyncResult[Any]] = {}
        self.refusals = 0
        self.gives_up = False
        #: Those whose first call got no answer: it may have been recorded by then, without ever having been sent.
        self.doubtful: list[str] = []

    def call(self, message_id: str) -> AsyncResult[Any]:
        while True:
            try:
                return self.app.tasks[self.task].apply_async((message_id,), message_id=message_id)
            except StoreUnavailableError as error:
                self.refusals += 1
                if not error.unsent:
                    self.doubtful.append(message_id)
                if self.gives_up:
                    raise

    def call_all(self, message_ids: list[str]) -> None:
        for message_id in message_ids:
            self.results[message_id] = self.call(message_id)

    @contextmanager
    def calling(self, message_ids: list[str]) -> Iterator[None]:
        """Call them all during the block, and end with it: a thread that outlives it would leave its connection open."""
        with ThreadPoolExecutor(max_workers=1) as beside:
            calls = beside.submit(self.call_all, message_ids)
            try:
                yield
                calls.result(60)
            except BaseException:
                self.gives_up = True
                raise

    def assert_answered(self) -> None:
        # The caller did not learn whether it was sent, and calls again: that sends it once it counts as lost.
        for message_id in self.doubtful:
            wait_until(lambda: self.call(message_id).ready(), interval=0.5, describe=f"the doubtful {message_id}")  # noqa: B023
        for message_id, result in self.results.items():
            if message_id not in self.doubtful:
                assert result.get(timeout=60) == message_id


@early_and_late
@pytest.mark.parametrize("go_down", ["stop", "kill"])
def test_two_hundred_messages_run_once_each_while_the_server_goes_and_comes(
    spec: AppSpec,
    open_app: OpenApp,
    start_worker_with_short_waits: StartImpatient,
    ledger: Ledger,
    postgresql: PrivatePostgreSQL,
    task: str,
    go_down: str,
) -> None:
    app = open_app(replace(spec, settings={**spec.settings, "idempotent_lost_after": 2}))
    caller = Caller(app, task)
    message_ids = [f"m-{number}" for number in range(200)]
    worker = start_worker_with_short_waits(pool="prefork", concurrency=2)

    # A worker that keeps up has nothing left at the moment the server goes: these come due while it is away.
    due_ids = [f"due-{number}" for number in range(4)]

    with caller.calling(message_ids):
        wait_until(lambda: len(ledger.ends(task)) >= 20, describe="the first runs")
        due = [app.tasks[task].apply_async((name,), message_id=name, countdown=3) for name in due_ids]
        getattr(postgresql, go_down)()
        wait_for_log(worker, PUTS_BACK, WAITS, count=2)
        wait_until(lambda: caller.refusals, describe="a refusal")
        postgresql.start()

    caller.assert_answered()
    assert [result.get(timeout=60) for result in due] == due_ids
    assert_ran_once_each(app, ledger, task, [*message_ids, *due_ids])


@early_and_late
def test_a_message_received_in_an_outage_runs_after_it(
    app: Celery, start_worker_with_short_waits: StartImpatient, ledger: Ledger, postgresql: PrivatePostgreSQL, task: str
) -> None:
    worker = start_worker_with_short_waits(pool="prefork", concurrency=2)
    app.tasks[task].apply_async(("warm",), message_id="warm").get(timeout=60)
    message_ids = [f"m-{number}" for number in range(8)]
    results = [app.tasks[task].apply_async((number,), message_id=number, countdown=2) for number in message_ids]

    postgresql.stop()
    by_name = app.send_task(task, ("by name",), message_id="by-name")
    # Some of them twice by now.
    wait_for_log(worker, PUTS_BACK, count=10)
    assert len(ledger.starts(task)) == 1
    postgresql.start()

    assert [result.get(timeout=60) for result in results] == message_ids
    assert by_name.get(timeout=60) == "by name"
    assert_ran_once_each(app, ledger, task, ["warm", "by-name", *message_ids])
    assert {row.duplicates for row in app.queue_log.store.rows(RowFilter(task_name=task))} == {0}


@contextmanager
def server_stopped(server: PrivatePostgreSQL, table: str) -> Iterator[None]:
    server.stop()
    yield
    server.start()


@contextmanager
def table_renamed(server: PrivatePostgreSQL, table: str) -> Iterator[None]:
    """As while a table is restored, or swapped for another."""
    engine = create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f"ALTER TABLE {table} RENAME TO {table}_away"))
        yield
        connection.execute(text(f"ALTER TABLE {table}_away RENAME TO {table}"))


@pytest.mark.parametrize("outage", [server_stopped, table_renamed])
def test_bodies_that_end_during_the_outage_are_kept_until_it_is_over(
    app: Celery,
    start_worker_with_short_waits: StartImpatient,
    ledger: Ledger,
    postgresql: PrivatePostgreSQL,
    tmp_path: Any,
    outage: Callable[[PrivatePostgreSQL, str], AbstractContextManager[None]],
) -> None:
    worker = start_worker_with_short_waits(pool="prefork", concurrency=4)
    gate = tmp_path / "gate"
    ends = app.tasks["ends"]
    succeeded = ends.apply_async((str(gate), "succeed"), message_id="succeed")
    linked = ends.apply_async((str(gate), "link"), message_id="link", link=app.tasks["echo"].si("linked"))
    failed = ends.apply_async((str(gate), "fail"), message_id="fail")
    retried = ends.apply_async((str(gate), "retry"), message_id="retry")
    wait_until(lambda: len(ledger.starts("ends")) == 4, describe="all starts")

    with outage(postgresql, app.queue_log.settings.table):
        gate.touch()
        for what in ("record a success", "note a recovery point", "record a failure", "hand a message on"):
            wait_for_log(worker, f"cannot {what} for ends[")
        assert not any(result.ready() for result in (succeeded, linked, failed, retried))

    assert (succeeded.get(timeout=60), linked.get(timeout=60), retried.get(timeout=60)) == ("succeed", "link", "retry")
    with pytest.raises(ValueError, match="fail"):
        failed.get(timeout=60)
    wait_until(lambda: ledger.ends("echo"), describe="the callback")
    starts = sorted((note.message_id, note.retries) for note in ledger.starts("ends"))
    assert starts == [("fail", 0), ("link", 0), ("retry", 0), ("retry", 1), ("succeed", 0)]
    wait_until(
        lambda: all(row_of(app, name, "ends").status is Status.DONE for name in ("succeed", "link", "fail", "retry")),
        describe="the ends of all rows",
    )
    assert row_of(app, "fail", "ends").processed_status is ProcessedStatus.FAILURE
    assert row_of(app, "link", "ends").processed_status is ProcessedStatus.SUCCESS


def test_a_body_ends_although_its_row_was_forgotten(
    app: Celery,
    start_worker_with_short_waits: StartImpatient,
    ledger: Ledger,
    postgresql: PrivatePostgreSQL,
    tmp_path: Any,
) -> None:
    """A Redis without persistence was restarted, or a database restored: a message without a row was taken over by no one."""
    worker = start_worker_with_short_waits(pool="prefork", concurrency=5)
    gate = tmp_path / "gate"
    ends = app.tasks["ends"]
    succeeded = ends.apply_async((str(gate), "succeed"), message_id="succeed")
    linked = ends.apply_async((str(gate), "link"), message_id="link", link=app.tasks["echo"].si("linked"))
    failed = ends.apply_async((str(gate), "fail"), message_id="fail")
    retried = ends.apply_async((str(gate), "retry"), message_id="retry")
    atomic = app.tasks["ends.atomic"].apply_async((str(gate),), message_id="atomic")
    wait_until(lambda: len(ledger.starts("ends")) == 4 and ledger.starts("ends.atomic"), describe="all starts")

    engine = create_engine(postgresql.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f"DELETE FROM {app.queue_log.settings.table}"))
    gate.touch()

    assert (succeeded.get(timeout=60), linked.get(timeout=60), retried.get(timeout=60)) == ("succeed", "link", "retry")
    with pytest.raises(ValueError, match="fail"):
        failed.get(timeout=60)
    assert atomic.get(timeout=60) == 1
    wait_until(lambda: ledger.ends("echo"), describe="the callback")
    starts = sorted((note.message_id, note.retries) for note in ledger.starts("ends"))
    assert starts == [("fail", 0), ("link", 0), ("retry", 0), ("retry", 1), ("succeed", 0)]
    assert len(ledger.starts("ends.atomic")) == 2, "what was rolled back runs again"
    wait_until(lambda: done(app, "ends") == 4 and done(app, "ends.atomic") == 1, describe="the ends of all rows")
    assert row_of(app, "fail", "ends").message is not None, "it can be requeued"
    assert "the store forgot ends[succeed] while its body ran; recorded it again" in worker.log.read_text()


@pytest.mark.parametrize(
    ("how", "moment", "starts"),
    [("succeed", "claim", 1), ("succeed", "success", 1), ("fail", "failure", 1), ("retry", "retry", 2)],
    ids=["of a claim", "of a success", "of a failure", "of a retry"],
)
def test_an_answer_that_was_lost_on_its_way(
    spec: AppSpec,
    app: Celery,
    start_worker_with_short_waits: StartImpatient,
    ledger: Ledger,
    tmp_path: Any,
    how: str,
    moment: str,
    starts: int,
) -> None:
    gate = tmp_path / "gate"
    with Proxy(spec.store) as proxy:
        worker = start_worker_with_short_waits(settings={"idempotent_store": proxy.url}, pool="prefork")
        app.tasks["ends"].apply_async((__file__, "succeed"), message_id="warm").get(timeout=60)
        if moment == "claim":
            proxy.swallow_answer_to(b"UPDATE")
            gate.touch()
        result = app.tasks["ends"].apply_async((str(gate), how), message_id="m")
        if moment != "claim":
            wait_until(lambda: ledger.starts("ends", task_id=result.id), describe="the start")
            proxy.swallow_answer_to(b"UPDATE")
            gate.touch()
        assert proxy.swallowed.wait(60)
        wait_for_log(worker, WAITS)
        written = {"claim": "processing", "success": "done", "failure": "done", "retry": "pending"}[moment]
        assert row_of(app, "m", "ends").status == written, "the server has done what it was asked"

        proxy.reopen()
        assert str(result.get(timeout=60, propagate=False)) == how

        row = wait_until(
            lambda: row if (row := row_of(app, "m", "ends")).status is Status.DONE else None, describe="the end"
        )
        assert (row.token, row.duplicates) == (starts, 0)
        assert len(ledger.starts("ends", task_id=result.id)) == starts
        worker.stop()


@early_and_late
def test_a_frozen_server_hangs_and_loses_nothing(
    spec: AppSpec,
    open_app: OpenApp,
    start_worker_with_short_waits: StartImpatient,
    ledger: Ledger,
    postgresql: PrivatePostgreSQL,
    tmp_path: Any,
    task: str,
) -> None:
    app = open_app(replace(spec, settings={**spec.settings, "idempotent_lost_after": 2}))
    caller = Caller(app, task)
    before, meanwhile = [[f"{when}-{number}" for number in range(30)] for when in ("before", "meanwhile")]
    # Two children are in a body when it freezes, and the third is free to claim: it has run, so its connection is there.
    worker = start_worker_with_short_waits(pool="prefork", concurrency=3, settings={"task_acks_late": task == "late"})
    gate = tmp_path / "gate"
    running = {name: app.tasks["ends"].apply_async((str(gate), "succeed"), message_id=name) for name in ("one", "two")}
    wait_until(lambda: len(ledger.starts("ends")) == 2, describe="both starts")
    caller.call_all(before)
    wait_until(lambda: len(ledger.ends(task)) == len(before), describe="the first runs")
    wait_until(lambda: done(app, task) == len(before), describe="the ends of their rows")

    postgresql.pause()
    gate.touch()
    by_name = app.send_task(task, ("by name",), message_id="by name")
    with caller.calling(meanwhile):
        wait_for_log(worker, f"cannot claim {task}[by name], {WAITS}")
        wait_for_log(worker, "cannot record a success for ends[", count=len(running))
        wait_until(lambda: caller.refusals, describe="a refusal")
        postgresql.resume()

    caller.assert_answered()
    assert [result.get(timeout=60) for result in running.values()] == ["succeed", "succeed"]
    assert by_name.get(timeout=60) == "by name"
    assert_ran_once_each(app, ledger, "ends", list(running))
    assert_ran_once_each(app, ledger, task, [*before, *meanwhile, "by name"])


def test_a_frozen_server_does_not_stop_the_main_process(
    spec: AppSpec, app: Celery, start_worker_with_short_waits: StartImpatient, postgresql: PrivatePostgreSQL
) -> None:
    worker = start_worker_with_short_waits(pool="prefork")
    app.tasks["echo"].apply_async((1,), message_id="warm").get(timeout=60)
    revoked = app.tasks["echo"].apply_async((1,), message_id="m", countdown=3)
    app.control.revoke(revoked.id)
    worker.wait_for_log("Tasks flagged as revoked")

    postgresql.pause()
    worker.wait_for_log("echo[m] was revoked, but its row could not be ended: the queue log at ", timeout=60)
    answers = wait_until(lambda: app.control.ping(destination=[worker.hostname], timeout=5), describe="a pong")

    assert answers == [{worker.hostname: {"ok": "pong"}}]
    assert app.tasks["echo"].AsyncResult(revoked.id).state == "REVOKED"
    assert worker.log.read_text().count("gave no answer") == 1, "the store was asked once"


def test_run_goes_on_unguarded_and_loudly(
    spec: AppSpec,
    open_app: OpenApp,
    start_worker_with_short_waits: StartImpatient,
    ledger: Ledger,
    postgresql: PrivatePostgreSQL,
    tmp_path: Any,
) -> None:
    app = open_app(replace(spec, settings={**spec.settings, "idempotent_on_store_error": "run"}))
    worker = start_worker_with_short_waits(settings={"idempotent_on_store_error": "run"}, pool="threads")
    gate = tmp_path / "gate"
    running = app.tasks["ends"].apply_async((str(gate), "succeed"), message_id="running")
    wait_until(lambda: ledger.starts("ends"), describe="the start")

    postgresql.stop()
    gate.touch()
    assert running.get(timeout=60) == "succeed"
    arriving = app.tasks["echo"].apply_async((1,), message_id="arriving")
    assert arriving.get(timeout=60) == 1

    log = worker.log.read_text()
    assert "could not record a success for ends[running], so a copy of it may run again" in log
    assert "echo[arriving] runs unguarded, the store gives no answer" in log
    postgresql.start()
    assert row_of(app, "running", "ends").status is Status.PROCESSING
    assert app.queue_log.store.find(MessageKey("arriving", "echo")) is None


@pytest.mark.parametrize("takes_away", ["pause", "stop"])
def test_with_the_guard_off_nothing_waits_for_the_store(
    app: Celery,
    start_worker_with_short_waits: StartImpatient,
    ledger: Ledger,
    postgresql: PrivatePostgreSQL,
    takes_away: str,
) -> None:
    worker = start_worker_with_short_waits(settings={"idempotent_enabled": False}, pool="prefork")
    names = [f"m{number}" for number in range(5)]
    recorded = [app.tasks["echo"].apply_async((name,), message_id=name, countdown=3) for name in names]
    failing = app.tasks["fail"].apply_async(message_id="failing", countdown=3)

    getattr(postgresql, takes_away)()
    assert [result.get(timeout=20) for result in recorded] == names
    with pytest.raises(ValueError, match="as told"):
        failing.get(timeout=20)
    assert len(ledger.starts("echo")) == len(names)
    worker.wait_for_log("are ended once the store answers", timeout=60)

    if takes_away == "pause":
        postgresql.resume()
    else:
        postgresql.start()
    wait_until(lambda: done(app, "echo") == len(names), timeout=90, describe="the rows")
    wait_until(lambda: done(app, "fail") == 1, timeout=90, describe="the row of the failure")
    assert row_of(app, "failing", "fail").error == "ValueError: as told"


def test_raise_tells_the_caller(
    spec: AppSpec,
    open_app: OpenApp,
    start_worker_with_short_waits: StartImpatient,
    ledger: Ledger,
    postgresql: PrivatePostgreSQL,
    tmp_path: Any,
) -> None:
    app = open_app(spec)
    start_worker_with_short_waits(settings={"idempotent_on_store_error": "raise"}, pool="threads", concurrency=2)
    gate = tmp_path / "gate"
    running = app.tasks["ends"].apply_async((str(gate), "succeed"), message_id="running")
    arriving = app.tasks["echo"].apply_async((1,), message_id="arriving", countdown=2)
    wait_until(lambda: ledger.starts("ends"), describe="the start")

    postgresql.stop()
    gate.touch()

    for result in (running, arriving):
        error = result.get(timeout=60, propagate=False)
        assert (result.state, type(error)) == ("FAILURE", StoreUnavailableError)
        assert "the queue log at postgresql+psycopg://postgres@127.0.0.1" in str(error)
        assert "gave no answer" in str(error)
    assert ledger.starts("echo") == []


def test_a_lost_process_that_had_succeeded_is_answered_when_the_store_is_back(
    spec: AppSpec, app: Celery, start_worker: StartWorker, tmp_path: Path
) -> None:
    """It dies between the end of its row and its result, and the worker cannot ask the store just then."""
    gate = tmp_path / "gate"
    with Proxy(spec.store) as proxy:
        worker = start_worker(replace(spec, store=proxy.url, tasks=(*spec.tasks, "tests.support.apps.outcomes")))
        task = "die.unstored"
        app.send_task(task, (str(gate),), task_id="t-1", message_id="m-1")
        wait_until(lambda: done(app, task) == 1, timeout=60, describe="the end of the row")

        proxy.close_for_now()
        gate.touch()
        wait_for_log(worker, "could not expire the claim of", "could not fail the claim of")
        wait_until(lambda: app.AsyncResult("t-1").ready(), timeout=60, describe="a first answer")
        proxy.reopen()

        wait_until(lambda: app.AsyncResult("t-1").successful(), timeout=60, describe=worker.log_tail)
    assert app.AsyncResult("t-1").get() == {"value": "stored by another"}
