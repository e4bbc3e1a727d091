"""Transactions that give way to others, and commits whose answer is lost: the body is run again, or it is not, and never twice with effect."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy as sa
from celery import states
from sqlalchemy.exc import DBAPIError, OperationalError

from celery_idempotent import IdempotentTask, SQLStore
from celery_idempotent.core.records import Claim, ProcessedStatus, Status
from celery_idempotent.worker.unit_of_work import RUNS
from tests.integration.worker.atomic.conftest import EagerApp
from tests.support.effects import Effect, Effects, add_to
from tests.support.waiting import wait_until
from tests.support.wire_tap import WireTap

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE

on_servers = pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)
on_postgresql = pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)


# -- deadlocks ---------------------------------------------------------------------------------------------------------


class Opponent:
    """Somebody else's transaction, which has ``b`` and then wants ``a``, of a body that has ``a`` and wants ``b``."""

    def __init__(self, effects: Effects, session_of_the_body: int) -> None:
        self.effects = effects
        self.session_of_the_body = session_of_the_body
        self.has_b = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert self.has_b.wait(30)

    def _run(self) -> None:
        with self.effects.transaction() as connection:
            # MariaDB ends the one that wrote less.
            connection.execute(sa.insert(Effect), [{"name": f"weight {number}", "value": 0} for number in range(50)])
            connection.execute(add_to("b"))
            self.has_b.set()
            # PostgreSQL ends the one that finds out, which is the one that has waited for longer.
            wait_until(self._is_waited_for, describe="the body waits for b")
            connection.execute(add_to("a"))

    def _is_waited_for(self) -> bool:
        waits = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND pid = :body"
            if self.effects.engine.dialect.name == "postgresql"
            else "SELECT count(*) FROM information_schema.innodb_trx "
            "WHERE trx_state = 'LOCK WAIT' AND trx_mysql_thread_id = :body"
        )
        with self.effects.engine.connect() as eyes:
            return bool(eyes.scalar(sa.text(waits), {"body": self.session_of_the_body}))


def session_of(task: IdempotentTask) -> int:
    """Return the server's number for the connection of the body that runs."""
    postgresql = task.connection.dialect.name == "postgresql"
    return int(task.connection.scalar(sa.text("SELECT pg_backend_pid()" if postgresql else "SELECT connection_id()")))


@on_servers
@pytest.mark.parametrize("caught", [False, True], ids=["raised", "caught by the body"])
def test_a_deadlock_runs_the_body_again(eager_app: EagerApp, caught: bool, caplog: pytest.LogCaptureFixture) -> None:
    eager_app.effects.put("a", "b")
    opponents: list[Opponent] = []
    runs = []

    def body(self: IdempotentTask) -> int:
        runs.append(self.request.retries)
        self.session.add(Effect(name="paid"))
        self.session.flush()
        self.connection.execute(add_to("a"))
        if not opponents:
            opponents.append(Opponent(eager_app.effects, session_of(self)))
        try:
            self.connection.execute(add_to("b"))
        except OperationalError:
            if not caught:
                raise
        return len(runs)

    done = eager_app.run(body)
    opponents[0].thread.join()

    assert done.result.get() == 2
    assert runs == [0, 0]  # no retry of Celery's
    assert (done.row.processed_status, done.row.token) == (SUCCESS, 1)
    assert eager_app.effects.count("paid") == 1
    assert (eager_app.effects.value("a"), eager_app.effects.value("b")) == (2, 2)
    assert f"is run again, because its transaction was not committed (run 1 of {RUNS})" in caplog.text


# -- fixed snapshots ---------------------------------------------------------------------------------------------------


OpenRepeatableRead = Callable[[str], EagerApp]


@pytest.fixture
def open_repeatable_read(open_eager_app: Callable[..., EagerApp]) -> Iterator[OpenRepeatableRead]:
    """Atomic bodies whose transactions give way when what they write was written since they began to read."""
    with ExitStack() as stack:

        def open_repeatable_read(url: str) -> EagerApp:
            engine = fixing_snapshots(url)
            stack.callback(engine.dispose)
            return open_eager_app(SQLStore(engine), isolation_level="REPEATABLE READ")

        yield open_repeatable_read


@pytest.fixture
def repeatable_read_app(open_repeatable_read: OpenRepeatableRead, store_url: str) -> EagerApp:
    return open_repeatable_read(store_url)


def fixing_snapshots(url: str) -> sa.Engine:
    """Return an engine whose transactions at ``REPEATABLE READ`` do not write what was written since their snapshot."""
    engine = sa.create_engine(url)
    if engine.dialect.name != "postgresql":

        @sa.event.listens_for(engine, "connect")
        def fix(connection: sa.engine.interfaces.DBAPIConnection, record: object) -> None:
            cursor = connection.cursor()
            cursor.execute("SET SESSION innodb_snapshot_isolation = ON")
            cursor.close()

    return engine


@on_servers
def test_a_serialization_failure_runs_the_body_again(repeatable_read_app: EagerApp) -> None:
    repeatable_read_app.effects.put("account")
    seen = []

    def body(self: IdempotentTask) -> None:
        seen.append(self.session.scalars(sa.select(Effect.value).where(Effect.name == "account")).one())
        if len(seen) == 1:
            with repeatable_read_app.effects.transaction() as other:
                other.execute(add_to("account"))
        self.session.add(Effect(name="paid"))
        self.connection.execute(add_to("account"))

    done = repeatable_read_app.run(body)

    assert done.row.processed_status is SUCCESS
    assert seen == [0, 1]
    assert (repeatable_read_app.effects.value("account"), repeatable_read_app.effects.count("paid")) == (2, 1)


@on_servers
def test_a_body_that_always_gives_way_fails_in_the_end(repeatable_read_app: EagerApp) -> None:
    repeatable_read_app.effects.put("account")
    runs = []

    def body(self: IdempotentTask) -> None:
        runs.append(self.session.scalars(sa.select(Effect.value).where(Effect.name == "account")).one())
        self.session.add(Effect(name="paid"))
        with repeatable_read_app.effects.transaction() as other:
            other.execute(add_to("account"))
        self.connection.execute(add_to("account"))

    done = repeatable_read_app.run(body)

    assert isinstance(done.result.result, DBAPIError)
    assert runs == list(range(RUNS))
    assert (done.row.status, done.row.processed_status, done.row.token) == (Status.DONE, FAILURE, 1)
    assert "OperationalError" in (done.row.error or "")
    assert repeatable_read_app.effects.names() == ["account"]


@on_servers
def test_a_body_whose_lease_was_renewed_completes_at_its_second_run(repeatable_read_app: EagerApp) -> None:
    """Its own row is written during the transaction, so it runs again under a lease that needs no renewal."""
    leases: list[bool] = []

    def body(self: IdempotentTask) -> int:
        began = time.monotonic()
        self.session.scalars(sa.select(Effect.value)).all()  # which fixes the snapshot
        self.session.add(Effect(name="paid"))
        if not leases:  # what the second run may take as well
            wait_until(lambda: time.monotonic() - began > 1.0)
        before = repeatable_read_app.row(self)
        claim = Claim(before.key, before.token)
        assert repeatable_read_app.store.renew([claim], lease=60.0) == []
        leases.append(repeatable_read_app.row(self).lease_expires_at != before.lease_expires_at)
        return len(leases)

    done = repeatable_read_app.run(body)

    assert done.result.get() == 2
    assert leases == [True, False]
    assert done.row.processed_status is SUCCESS
    assert repeatable_read_app.effects.names() == ["paid"]


@on_servers
def test_a_claim_that_was_lost_is_not_run_for_again(
    repeatable_read_app: EagerApp, caplog: pytest.LogCaptureFixture
) -> None:
    runs = []

    def body(self: IdempotentTask) -> None:
        runs.append(self.session.scalars(sa.select(Effect.value)).all())
        row = repeatable_read_app.row(self)
        assert repeatable_read_app.store.expire(Claim(row.key, row.token))
        assert repeatable_read_app.store.take_over(
            repeatable_read_app.row(self), task_id="x", worker="other", lease=60.0, attempt=0
        )
        self.session.add(Effect(name="paid"))

    done = repeatable_read_app.run(body)

    assert done.result.state == states.IGNORED
    assert len(runs) == 1
    assert (done.row.status, done.row.token, done.row.worker) == (Status.PROCESSING, 2, "other")
    assert repeatable_read_app.effects.names() == []
    assert "what its body wrote in its transaction was rolled back" in caplog.text


@on_servers
@pytest.mark.parametrize("kind", ["default", "fixed"])
def test_a_duplicate_that_is_newer_than_the_snapshot_is_one(
    eager_app: EagerApp, open_repeatable_read: OpenRepeatableRead, store_url: str, kind: str
) -> None:
    """Where what is newer cannot be seen at all, the body is run again, and sees it."""
    at = eager_app if kind == "default" else open_repeatable_read(store_url)
    told = at.task(lambda self, order: order, name="told", atomic=False, message_id="{order}")
    seen: list[bool | None] = []

    def body(self: IdempotentTask) -> None:
        self.session.scalars(sa.select(Effect.value)).all()
        if not seen:
            contextvars.Context().run(told.delay, "o-1")
        seen.append(None)
        seen[-1] = told.delay("o-1").duplicate
        self.session.add(Effect(name="paid"))

    done = at.run(body)

    assert done.row.processed_status is SUCCESS
    assert seen[-1] is True
    assert at.effects.names() == ["paid"]


# -- a file with one writer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_file_that_somebody_else_writes_to_is_waited_for(
    eager_app: EagerApp, open_eager_app: Callable[..., EagerApp], store_url: str
) -> None:
    impatient = open_eager_app(SQLStore(f"{store_url}?timeout=0.01"))
    other = eager_app.effects.engine.connect()
    runs = []

    def body(self: IdempotentTask) -> int:
        runs.append(1)
        if len(runs) == 1:
            other.execute(sa.text("BEGIN IMMEDIATE"))
        if len(runs) == 2:
            other.rollback()
        self.session.add(Effect(name="paid"))
        try:
            self.session.flush()
        except OperationalError:
            other.rollback()  # or the message's end could not be written
            raise
        return len(runs)

    done = impatient.run(body)
    other.close()

    assert done.result.get() == 2
    assert eager_app.effects.names() == ["paid"]


# -- broken connections ------------------------------------------------------------------------------------------------


@pytest.fixture
def wire_tap(store_url: str) -> Iterator[WireTap]:
    with WireTap(store_url) as wire_tap:
        yield wire_tap


@pytest.fixture
def eager_app_behind_tap(open_eager_app: Callable[..., EagerApp], wire_tap: WireTap) -> EagerApp:
    return open_eager_app(SQLStore(wire_tap.url))


@on_servers
class TestABrokenConnection:
    def test_a_first_statement_without_a_connection_runs_the_body_again(
        self, eager_app_behind_tap: EagerApp, wire_tap: WireTap
    ) -> None:
        runs = []

        def body(self: IdempotentTask) -> int:
            runs.append(1)
            if len(runs) == 1:
                wire_tap.cut()
            self.session.add(Effect(name="paid"))
            return len(runs)

        done = eager_app_behind_tap.run(body)

        assert done.result.get() == 2
        assert eager_app_behind_tap.effects.names() == ["paid"]

    def test_in_the_body_runs_the_body_again(self, eager_app_behind_tap: EagerApp, wire_tap: WireTap) -> None:
        runs = []

        def body(self: IdempotentTask) -> int:
            runs.append(1)
            self.session.scalars(sa.select(Effect.id)).all()
            if len(runs) == 1:
                wire_tap.cut()
            self.session.add(Effect(name="paid"))
            return len(runs)

        done = eager_app_behind_tap.run(body)

        assert done.result.get() == 2
        assert eager_app_behind_tap.effects.names() == ["paid"]

    def test_at_the_completion_runs_the_body_again(self, eager_app_behind_tap: EagerApp, wire_tap: WireTap) -> None:
        runs = []

        def body(self: IdempotentTask) -> int:
            runs.append(1)
            self.session.add(Effect(name="paid"))
            self.session.flush()
            if len(runs) == 1:
                wire_tap.cut()
            return len(runs)

        done = eager_app_behind_tap.run(body)

        assert done.result.get() == 2
        assert eager_app_behind_tap.effects.names() == ["paid"]

    def test_leaves_the_lease_as_long_as_it_was(self, eager_app_behind_tap: EagerApp, wire_tap: WireTap) -> None:
        """A process that dies in the second run is not waited for any longer than one that dies in the first."""
        left: list[float] = []

        def body(self: IdempotentTask) -> None:
            began = time.monotonic()
            self.session.add(Effect(name="paid"))
            self.session.flush()
            left.append(eager_app_behind_tap.row(self).lease_left)
            if len(left) == 1:
                wait_until(lambda: time.monotonic() - began > 1.0)
                wire_tap.cut()

        done = eager_app_behind_tap.run(body, lease=60.0)

        assert done.row.processed_status is SUCCESS
        assert len(left) == 2
        assert 50.0 < left[1] <= 60.0

    @pytest.mark.parametrize(
        ("ends", "expected"),
        [
            # It is the second run, under the lease that it had, which shows that renewals are in its way.
            (["broken"], ["broken", "renewed", "not renewed"]),
            (["renewed", "broken"], ["renewed", "broken", "not renewed"]),
        ],
        ids=["before a renewal was in the way", "after one was"],
    )
    def test_and_renewals_together_do_not_keep_a_body_from_its_end(
        self, open_repeatable_read: OpenRepeatableRead, wire_tap: WireTap, ends: Sequence[str], expected: Sequence[str]
    ) -> None:
        eager_app = open_repeatable_read(wire_tap.url)
        runs: list[str] = []

        def body(self: IdempotentTask) -> int:
            began = time.monotonic()
            self.session.scalars(sa.select(Effect.value)).all()  # which fixes the snapshot
            self.session.add(Effect(name="paid"))
            if ends[len(runs) : len(runs) + 1] == ["broken"]:
                runs.append("broken")
                wire_tap.cut()
                self.session.flush()
            wait_until(lambda: time.monotonic() - began > 0.5)
            before = eager_app.row(self)
            assert eager_app.store.renew([Claim(before.key, before.token)], lease=60.0) == []
            moved = eager_app.row(self).lease_expires_at != before.lease_expires_at
            runs.append("renewed" if moved else "not renewed")
            return len(runs)

        done = eager_app.run(body, lease=60.0)

        assert runs == expected
        assert done.row.processed_status is SUCCESS
        assert eager_app.effects.names() == ["paid"]

    def test_at_the_commit_is_found_out_about_and_nothing_is_done_again(
        self, eager_app_behind_tap: EagerApp, wire_tap: WireTap, caplog: pytest.LogCaptureFixture
    ) -> None:
        runs = []

        def body(self: IdempotentTask) -> int:
            runs.append(1)
            self.session.add(Effect(name="paid"))
            self.session.flush()
            wire_tap.cut(after_answers=1)
            return len(runs)

        done = eager_app_behind_tap.run(body)

        assert done.result.get() == 1
        assert eager_app_behind_tap.effects.names() == ["paid"]
        assert (done.row.status, done.row.processed_status, done.row.token) == (Status.DONE, SUCCESS, 1)
        assert "was committed, although the answer to the commit was lost" in caplog.text

    def test_at_the_commit_of_a_recovery_point_too(self, eager_app_behind_tap: EagerApp, wire_tap: WireTap) -> None:
        runs, called = [], []

        @eager_app_behind_tap.app.task(name="linked", shared=False)
        def linked(value: int) -> None:
            called.append(value)

        def body(self: IdempotentTask) -> int:
            runs.append(1)
            self.session.add(Effect(name="paid"))
            self.session.flush()
            wire_tap.cut(after_answers=1)
            return len(runs)

        task = eager_app_behind_tap.task(body)
        result = task.apply(message_id="m", link=eager_app_behind_tap.app.tasks["linked"].s())

        assert (result.get(), called) == (1, [1])
        assert eager_app_behind_tap.effects.names() == ["paid"]
        assert eager_app_behind_tap.row(task).status is Status.DONE

    def test_at_a_commit_that_did_not_take_place_runs_the_body_again(
        self, eager_app_behind_tap: EagerApp, wire_tap: WireTap, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The server ends the connection before it reads the commit."""
        runs: list[int] = []
        commit: Any = sa.engine.default.DefaultDialect.do_commit

        def cut_off(dialect: sa.engine.Dialect, connection: sa.engine.interfaces.DBAPIConnection) -> None:
            if len(runs) == 1:
                kill(eager_app_behind_tap.effects, pids[0])
            commit(dialect, connection)

        pids: list[int] = []

        def body(self: IdempotentTask) -> int:
            runs.append(1)
            pids.append(session_of(self))
            self.session.add(Effect(name="paid"))
            return len(runs)

        monkeypatch.setattr(
            eager_app_behind_tap.store.engine.dialect,
            "do_commit",
            cut_off.__get__(eager_app_behind_tap.store.engine.dialect),
        )
        done = eager_app_behind_tap.run(body)

        assert done.result.get() == 2
        assert eager_app_behind_tap.effects.names() == ["paid"]


def kill(effects: Effects, pid: int) -> None:
    """Have the server end a connection, and wait until it has."""
    postgresql = effects.engine.dialect.name == "postgresql"
    with effects.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text(f"SELECT pg_terminate_backend({pid})" if postgresql else f"KILL {pid}"))
        left = (
            f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}"
            if postgresql
            else f"SELECT count(*) FROM information_schema.processlist WHERE id = {pid}"
        )
        wait_until(lambda: not connection.scalar(sa.text(left)), describe="the end of the connection")
