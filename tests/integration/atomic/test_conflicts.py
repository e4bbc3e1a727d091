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
from tests.integration.atomic.conftest import Here
from tests.integration.sql.wire import Wire
from tests.support.effects import Effect, Effects, add_to
from tests.support.waiting import wait_until

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
def test_a_deadlock_runs_the_body_again(here: Here, caught: bool, caplog: pytest.LogCaptureFixture) -> None:
    here.effects.put("a", "b")
    opponents: list[Opponent] = []
    runs = []

    def body(self: IdempotentTask) -> int:
        runs.append(self.request.retries)
        self.session.add(Effect(name="paid"))
        self.session.flush()
        self.connection.execute(add_to("a"))
        if not opponents:
            opponents.append(Opponent(here.effects, session_of(self)))
        try:
            self.connection.execute(add_to("b"))
        except OperationalError:
            if not caught:
                raise
        return len(runs)

    done = here.run(body)
    opponents[0].thread.join()

    assert done.result.get() == 2
    assert runs == [0, 0]  # no retry of Celery's
    assert (done.row.processed_status, done.row.token) == (SUCCESS, 1)
    assert here.effects.count("paid") == 1
    assert (here.effects.value("a"), here.effects.value("b")) == (2, 2)
    assert f"is run again, as its transaction was not committed (run 1 of {RUNS})" in caplog.text


# -- fixed snapshots ---------------------------------------------------------------------------------------------------


OpenFixed = Callable[[str], Here]


@pytest.fixture
def open_fixed(open_here: Callable[..., Here]) -> Iterator[OpenFixed]:
    """Atomic bodies whose transactions give way when what they write was written since they began to read."""
    with ExitStack() as stack:

        def open_fixed(url: str) -> Here:
            engine = fixing_snapshots(url)
            stack.callback(engine.dispose)
            return open_here(SQLStore(engine), isolation_level="REPEATABLE READ")

        yield open_fixed


@pytest.fixture
def fixed(open_fixed: OpenFixed, store_url: str) -> Here:
    return open_fixed(store_url)


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
def test_a_serialization_failure_runs_the_body_again(fixed: Here) -> None:
    fixed.effects.put("account")
    seen = []

    def body(self: IdempotentTask) -> None:
        seen.append(self.session.scalars(sa.select(Effect.value).where(Effect.name == "account")).one())
        if len(seen) == 1:
            with fixed.effects.transaction() as other:
                other.execute(add_to("account"))
        self.session.add(Effect(name="paid"))
        self.connection.execute(add_to("account"))

    done = fixed.run(body)

    assert done.row.processed_status is SUCCESS
    assert seen == [0, 1]
    assert (fixed.effects.value("account"), fixed.effects.count("paid")) == (2, 1)


@on_servers
def test_a_body_that_always_gives_way_fails_in_the_end(fixed: Here) -> None:
    fixed.effects.put("account")
    runs = []

    def body(self: IdempotentTask) -> None:
        runs.append(self.session.scalars(sa.select(Effect.value).where(Effect.name == "account")).one())
        self.session.add(Effect(name="paid"))
        with fixed.effects.transaction() as other:
            other.execute(add_to("account"))
        self.connection.execute(add_to("account"))

    done = fixed.run(body)

    assert isinstance(done.result.result, DBAPIError)
    assert runs == list(range(RUNS))
    assert (done.row.status, done.row.processed_status, done.row.token) == (Status.DONE, FAILURE, 1)
    assert "OperationalError" in (done.row.error or "")
    assert fixed.effects.names() == ["account"]


@on_servers
def test_a_body_whose_lease_was_renewed_completes_at_its_second_run(fixed: Here) -> None:
    """Its own row is written beside it, so it is run again under a lease that needs no renewal."""
    leases: list[bool] = []

    def body(self: IdempotentTask) -> int:
        began = time.monotonic()
        self.session.scalars(sa.select(Effect.value)).all()  # which fixes the snapshot
        self.session.add(Effect(name="paid"))
        if not leases:  # what the second run may take as well
            wait_until(lambda: time.monotonic() - began > 1.0)
        before = fixed.row(self)
        claim = Claim(before.key, before.token)
        assert fixed.store.renew([claim], lease=60.0) == []
        leases.append(fixed.row(self).lease_expires_at != before.lease_expires_at)
        return len(leases)

    done = fixed.run(body)

    assert done.result.get() == 2
    assert leases == [True, False]
    assert done.row.processed_status is SUCCESS
    assert fixed.effects.names() == ["paid"]


@on_servers
def test_a_claim_that_was_lost_is_not_run_for_again(fixed: Here, caplog: pytest.LogCaptureFixture) -> None:
    runs = []

    def body(self: IdempotentTask) -> None:
        runs.append(self.session.scalars(sa.select(Effect.value)).all())
        row = fixed.row(self)
        assert fixed.store.expire(Claim(row.key, row.token))
        assert fixed.store.take_over(fixed.row(self), task_id="x", worker="other", lease=60.0, attempt=0)
        self.session.add(Effect(name="paid"))

    done = fixed.run(body)

    assert done.result.state == states.IGNORED
    assert len(runs) == 1
    assert (done.row.status, done.row.token, done.row.worker) == (Status.PROCESSING, 2, "other")
    assert fixed.effects.names() == []
    assert "what its body wrote in its transaction was rolled back" in caplog.text


@on_servers
@pytest.mark.parametrize("kind", ["default", "fixed"])
def test_a_duplicate_that_is_newer_than_the_snapshot_is_one(
    here: Here, open_fixed: OpenFixed, store_url: str, kind: str
) -> None:
    """Where what is newer cannot be seen at all, the body is run again, and sees it."""
    at = here if kind == "default" else open_fixed(store_url)
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
    here: Here, open_here: Callable[..., Here], store_url: str
) -> None:
    impatient = open_here(SQLStore(f"{store_url}?timeout=0.01"))
    other = here.effects.engine.connect()
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
            other.rollback()  # or nobody could write down what becomes of the message
            raise
        return len(runs)

    done = impatient.run(body)
    other.close()

    assert done.result.get() == 2
    assert here.effects.names() == ["paid"]


# -- broken connections ------------------------------------------------------------------------------------------------


@pytest.fixture
def wire(store_url: str) -> Iterator[Wire]:
    with Wire(store_url) as wire:
        yield wire


@pytest.fixture
def wired(open_here: Callable[..., Here], wire: Wire) -> Here:
    return open_here(SQLStore(wire.url))


@on_servers
class TestABrokenConnection:
    def test_that_cannot_be_made_runs_the_body_again(self, wired: Here, wire: Wire) -> None:
        runs = []

        def body(self: IdempotentTask) -> int:
            runs.append(1)
            if len(runs) == 1:
                wire.cut()
            self.session.add(Effect(name="paid"))
            return len(runs)

        done = wired.run(body)

        assert done.result.get() == 2
        assert wired.effects.names() == ["paid"]

    def test_in_the_body_runs_the_body_again(self, wired: Here, wire: Wire) -> None:
        runs = []

        def body(self: IdempotentTask) -> int:
            runs.append(1)
            self.session.scalars(sa.select(Effect.id)).all()
            if len(runs) == 1:
                wire.cut()
            self.session.add(Effect(name="paid"))
            return len(runs)

        done = wired.run(body)

        assert done.result.get() == 2
        assert wired.effects.names() == ["paid"]

    def test_at_the_completion_runs_the_body_again(self, wired: Here, wire: Wire) -> None:
        runs = []

        def body(self: IdempotentTask) -> int:
            runs.append(1)
            self.session.add(Effect(name="paid"))
            self.session.flush()
            if len(runs) == 1:
                wire.cut()
            return len(runs)

        done = wired.run(body)

        assert done.result.get() == 2
        assert wired.effects.names() == ["paid"]

    def test_leaves_the_lease_as_long_as_it_was(self, wired: Here, wire: Wire) -> None:
        """A process that dies in the second run is not waited for any longer than one that dies in the first."""
        left: list[float] = []

        def body(self: IdempotentTask) -> None:
            began = time.monotonic()
            self.session.add(Effect(name="paid"))
            self.session.flush()
            left.append(wired.row(self).lease_left)
            if len(left) == 1:
                wait_until(lambda: time.monotonic() - began > 1.0)
                wire.cut()

        done = wired.run(body, lease=60.0)

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
        self, open_fixed: OpenFixed, wire: Wire, ends: Sequence[str], expected: Sequence[str]
    ) -> None:
        here = open_fixed(wire.url)
        runs: list[str] = []

        def body(self: IdempotentTask) -> int:
            began = time.monotonic()
            self.session.scalars(sa.select(Effect.value)).all()  # which fixes the snapshot
            self.session.add(Effect(name="paid"))
            if ends[len(runs) : len(runs) + 1] == ["broken"]:
                runs.append("broken")
                wire.cut()
                self.session.flush()
            wait_until(lambda: time.monotonic() - began > 0.5)
            before = here.row(self)
            assert here.store.renew([Claim(before.key, before.token)], lease=60.0) == []
            moved = here.row(self).lease_expires_at != before.lease_expires_at
            runs.append("renewed" if moved else "not renewed")
            return len(runs)

        done = here.run(body, lease=60.0)

        assert runs == expected
        assert done.row.processed_status is SUCCESS
        assert here.effects.names() == ["paid"]

    def test_at_the_commit_is_found_out_about_and_nothing_is_done_again(
        self, wired: Here, wire: Wire, caplog: pytest.LogCaptureFixture
    ) -> None:
        runs = []

        def body(self: IdempotentTask) -> int:
            runs.append(1)
            self.session.add(Effect(name="paid"))
            self.session.flush()
            wire.cut(after_answers=1)
            return len(runs)

        done = wired.run(body)

        assert done.result.get() == 1
        assert wired.effects.names() == ["paid"]
        assert (done.row.status, done.row.processed_status, done.row.token) == (Status.DONE, SUCCESS, 1)
        assert "was committed, although the answer was lost" in caplog.text

    def test_at_the_commit_of_a_recovery_point_too(self, wired: Here, wire: Wire) -> None:
        runs, called = [], []

        @wired.app.task(name="linked", shared=False)
        def linked(value: int) -> None:
            called.append(value)

        def body(self: IdempotentTask) -> int:
            runs.append(1)
            self.session.add(Effect(name="paid"))
            self.session.flush()
            wire.cut(after_answers=1)
            return len(runs)

        task = wired.task(body)
        result = task.apply(message_id="m", link=wired.app.tasks["linked"].s())

        assert (result.get(), called) == (1, [1])
        assert wired.effects.names() == ["paid"]
        assert wired.row(task).status is Status.DONE

    def test_at_a_commit_that_did_not_take_place_runs_the_body_again(
        self, wired: Here, wire: Wire, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The server is told to end the connection before it reads the commit."""
        runs: list[int] = []
        commit: Any = sa.engine.default.DefaultDialect.do_commit

        def cut_off(dialect: sa.engine.Dialect, connection: sa.engine.interfaces.DBAPIConnection) -> None:
            if len(runs) == 1:
                kill(wired.effects, pids[0])
            commit(dialect, connection)

        pids: list[int] = []

        def body(self: IdempotentTask) -> int:
            runs.append(1)
            pids.append(session_of(self))
            self.session.add(Effect(name="paid"))
            return len(runs)

        monkeypatch.setattr(wired.store.engine.dialect, "do_commit", cut_off.__get__(wired.store.engine.dialect))
        done = wired.run(body)

        assert done.result.get() == 2
        assert wired.effects.names() == ["paid"]


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
