"""One atomic body, however it ends: its effects are there when its message succeeded, and only then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from celery import states
from celery.concurrency.prefork import TaskPool
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_idempotent import (
    ConfigurationError,
    IdempotentError,
    IdempotentTask,
    QueueLog,
    SQLStore,
    StoreUnavailableError,
)
from celery_idempotent.core.records import Claim, NewMessage, NoResultReason, ProcessedStatus, Row, Status
from celery_idempotent.message.serialization import decode_result
from celery_idempotent.worker.bootsteps import CheckStep
from celery_idempotent.worker.run import Run
from tests.integration.worker.atomic.conftest import EagerApp
from tests.support.effects import Effect
from tests.support.wire_tap import WireTap

SUCCESS, FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE


def ending(row: Row) -> tuple[Status, ProcessedStatus | None]:
    return row.status, row.processed_status


def pay(task: IdempotentTask, name: str = "paid") -> str:
    task.session.add(Effect(name=name))
    return name


# -- success -----------------------------------------------------------------------------------------------------------


def test_the_effect_and_the_completion_are_one_commit(eager_app: EagerApp, statements: list[str]) -> None:
    seen: list[tuple[list[str], Status]] = []

    def body(self: IdempotentTask) -> str:
        self.session.add(Effect(name="paid"))
        self.session.flush()
        # Another connection sees neither.
        seen.append((eager_app.effects.names(), eager_app.row(self).status))
        statements.clear()
        return "receipt"

    done = eager_app.run(body)

    assert seen == [([], Status.PROCESSING)]
    assert (done.result.get(), ending(done.row)) == ("receipt", (Status.DONE, SUCCESS))
    assert done.row.result is not None
    assert decode_result(eager_app.app, done.row.result) == "receipt"
    assert eager_app.effects.names() == ["paid"]
    end = [statement.split()[0] for statement in statements]
    assert end[: end.index("COMMIT") + 1] == ["UPDATE", "COMMIT"]
    assert end.count("COMMIT") == 1


def test_it_costs_one_statement_more_than_the_same_transaction_by_hand(
    eager_app: EagerApp, statements: list[str]
) -> None:
    task = eager_app.task(pay)
    task.apply(message_id="first")  # which looks at the table
    statements.clear()
    with Session(eager_app.store.engine) as session:
        session.add(Effect(name="by hand"))
        session.commit()
    unseen = {"ROLLBACK", "BEGIN"}  # of which SQLite's driver has made the latter without a word, at its own time
    by_hand = [statement for statement in statements if statement not in unseen]
    statements.clear()

    task.apply(message_id="second")

    mine = [statement for statement in statements if statement not in unseen]
    started = next(index for index, statement in enumerate(mine) if "INSERT INTO effects" in statement)
    assert by_hand == ["INSERT INTO effects (name, value) VALUES " + by_hand[0].partition("VALUES ")[2], "COMMIT"]
    assert (mine[started], mine[-1]) == (by_hand[0], "COMMIT")
    (added,) = mine[started + 1 : -1]
    assert added.startswith("UPDATE queue_log SET")


@pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)
def test_and_one_round_trip_more(open_eager_app: Callable[..., EagerApp], store_url: str) -> None:
    with WireTap(store_url) as wire_tap:
        eager_app = open_eager_app(SQLStore(wire_tap.url))

        def body(self: IdempotentTask) -> None:
            wire_tap.listen()
            self.session.add(Effect(name="paid"))

        def by_hand() -> int:
            wire_tap.listen()
            with Session(eager_app.store.engine) as session:
                session.add(Effect(name="by hand"))
                session.commit()
            return len(wire_tap.asked)

        task = eager_app.task(body)
        for _ in range(2):  # a connection's first transaction begins with more
            expected = by_hand()
            task.apply()

        assert len(wire_tap.asked) == expected + 1, wire_tap.asked
        assert sum(b"COMMIT" in asked.upper() for asked in wire_tap.asked) == 1
        eager_app.store.close()


def test_a_body_that_has_no_use_for_its_transaction_has_none(eager_app: EagerApp, statements: list[str]) -> None:
    task = eager_app.task(lambda self: 5)
    task.apply(message_id="first")
    statements.clear()

    assert task.apply(message_id="second").get() == 5

    verbs = [statement.split()[0] for statement in statements if statement != "ROLLBACK"]
    # By apply(): whether a row answers the message. A message that was not recorded is claimed by an insert.
    assert verbs == ["SELECT", "UPDATE", "SELECT", "INSERT", "UPDATE"]


def test_session_and_connection_are_one_transaction(eager_app: EagerApp) -> None:
    def body(self: IdempotentTask) -> list[str]:
        self.connection.execute(sa.insert(Effect).values(name="by connection", value=0))
        assert self.session is self.session
        assert self.session.connection() is self.connection
        self.session.add(Effect(name="by session"))
        return list(self.connection.scalars(sa.select(Effect.name)))

    done = eager_app.run(body)

    assert done.result.get() == ["by connection"]  # the session has not flushed yet
    assert eager_app.effects.names() == ["by connection", "by session"]


def test_a_duplicate_has_no_effect(eager_app: EagerApp) -> None:
    task = eager_app.task(pay)

    results = [task.apply(("once",), message_id="m") for _ in range(2)]

    assert [result.get() for result in results] == ["once", "once"]
    assert eager_app.effects.names() == ["once"]


def test_the_effect_is_visible_once_the_result_is(eager_app: EagerApp) -> None:
    found = []

    @eager_app.app.task(name="linked", shared=False)
    def linked(value: str) -> None:
        found.append((value, eager_app.effects.names(), ending(eager_app.row(task))))

    task = eager_app.task(pay)

    task.apply(message_id="m", link=eager_app.app.tasks["linked"].s())

    # A recovery point, until it is known that the callback was sent.
    assert found == [("paid", ["paid"], (Status.PROCESSING, SUCCESS))]
    assert ending(eager_app.row(task)) == (Status.DONE, SUCCESS)


def test_threads_have_a_transaction_each(eager_app: EagerApp) -> None:
    """A task is one object for all threads of a worker."""
    barrier = threading.Barrier(2, timeout=30)
    connections = set()

    def body(self: IdempotentTask, name: str) -> None:
        connections.add(self.connection)
        barrier.wait()
        with turn:  # SQLite has one writer at a time
            self.session.add(Effect(name=name))

    turn = threading.Lock()
    task = eager_app.task(body)
    threads = [threading.Thread(target=task.apply, args=((name,),)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert eager_app.effects.names() == ["a", "b"]
    assert len(connections) == 2


# -- other ends --------------------------------------------------------------------------------------------------------


def test_an_error_rolls_back_and_is_recorded(eager_app: EagerApp) -> None:
    def body(self: IdempotentTask) -> None:
        self.session.add(Effect(name="paid"))
        self.session.flush()
        raise ValueError("no such card")

    done = eager_app.run(body)

    assert done.result.state == states.FAILURE
    assert (ending(done.row), done.row.error) == ((Status.DONE, FAILURE), "ValueError: no such card")
    assert eager_app.effects.names() == []


def test_an_error_of_the_last_flush_is_the_bodys(eager_app: EagerApp) -> None:
    eager_app.effects.put("there")

    def body(self: IdempotentTask) -> None:
        self.session.add(Effect(id=1, name="the same key"))

    done = eager_app.run(body)

    assert isinstance(done.result.result, IntegrityError)
    assert ending(done.row) == (Status.DONE, FAILURE)
    assert eager_app.effects.names() == ["there"]


@pytest.mark.parametrize("automatic", [False, True], ids=["retry()", "autoretry_for"])
def test_a_retry_rolls_back(eager_app: EagerApp, automatic: bool) -> None:
    pending = []

    def body(self: IdempotentTask) -> int:
        attempt = self.request.retries
        if attempt:
            pending.append(eager_app.effects.names())
        self.session.add(Effect(name=f"attempt {attempt}"))
        self.session.flush()
        if attempt < 2:
            if automatic:
                raise ValueError("once more")
            raise self.retry(countdown=0)
        return int(attempt)

    options: dict[str, Any] = {"autoretry_for": (ValueError,), "default_retry_delay": 0} if automatic else {}
    done = eager_app.run(body, **options)

    assert done.result.get() == 2
    assert (ending(done.row), done.row.attempt) == ((Status.DONE, SUCCESS), 2)
    assert pending == [[], []]
    assert eager_app.effects.names() == ["attempt 2"]


def test_an_ignored_message_keeps_its_effects(eager_app: EagerApp) -> None:
    """``Ignore`` is a success without a result."""

    def body(self: IdempotentTask) -> None:
        self.session.add(Effect(name="paid"))
        raise Ignore

    done = eager_app.run(body)

    assert (ending(done.row), done.row.error) == ((Status.DONE, SUCCESS), NoResultReason.IGNORED)
    assert eager_app.effects.names() == ["paid"]


@pytest.mark.parametrize("requeue", [False, True], ids=["dropped", "requeued"])
def test_a_rejected_message_has_no_effect(eager_app: EagerApp, requeue: bool) -> None:
    def body(self: IdempotentTask) -> None:
        self.session.add(Effect(name="paid"))
        self.session.flush()
        raise Reject("not me", requeue=requeue)

    done = eager_app.run(body)

    assert ending(done.row) == (Status.DONE, FAILURE)
    assert eager_app.effects.names() == []


def test_a_soft_time_limit_rolls_back_and_drops_the_connection(eager_app: EagerApp) -> None:
    connections: list[Any] = []

    def body(self: IdempotentTask) -> None:
        self.session.add(Effect(name="paid"))
        self.session.flush()
        connections.append(self.connection.connection.dbapi_connection)
        raise SoftTimeLimitExceeded

    done = eager_app.run(body)

    assert isinstance(done.result.result, SoftTimeLimitExceeded)
    assert ending(done.row) == (Status.DONE, FAILURE)
    assert eager_app.effects.names() == []
    with eager_app.store.engine.connect() as connection:
        assert connection.connection.dbapi_connection is not connections[0]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_body_that_exits_its_process_leaves_nothing(eager_app: EagerApp, error: type[BaseException]) -> None:
    def body(self: IdempotentTask) -> None:
        self.session.add(Effect(name="paid"))
        self.session.flush()
        raise error

    task = eager_app.task(body)
    with pytest.raises(error):
        task.apply(message_id="m")

    assert eager_app.row(task).status is Status.PROCESSING  # for the worker that finds it abandoned
    assert eager_app.effects.names() == []
    assert eager_app.store.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_a_body_that_replaces_itself_keeps_what_it_did(eager_app: EagerApp) -> None:
    def pages(self: IdempotentTask, left: int) -> str:
        self.session.add(Effect(name=f"page {left}"))
        self.session.flush()
        if left:
            return str(self.replace(self.s(left - 1).set(message_id="pages")))
        return "the last"

    done = eager_app.run(pages, 2, message_id="pages")

    assert done.result.get() == "the last"
    assert eager_app.effects.names() == ["page 0", "page 1", "page 2"]


def test_a_body_that_is_replaced_keeps_what_it_did(eager_app: EagerApp) -> None:
    @eager_app.app.task(name="other", shared=False)
    def other() -> str:
        return "by the other"

    def body(self: IdempotentTask) -> Any:
        self.session.add(Effect(name="before"))
        return self.replace(eager_app.app.tasks["other"].s())

    done = eager_app.run(body)

    assert done.result.get() == "by the other"
    assert ending(done.row) == (Status.DONE, SUCCESS)
    assert eager_app.effects.names() == ["before"]


# -- a claim that is lost ----------------------------------------------------------------------------------------------


def lose(eager_app: EagerApp, task: IdempotentTask) -> None:
    """Let somebody else take over the message that runs."""
    row = eager_app.row(task)
    assert eager_app.store.expire(Claim(row.key, row.token))
    taken = eager_app.store.take_over(eager_app.row(task), task_id="other", worker="other", lease=60.0, attempt=0)
    assert taken is not None


@pytest.mark.parametrize("end", ["value", "error", "ignore"])
def test_an_owner_that_lost_its_claim_rolls_back_and_says_so(
    eager_app: EagerApp, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    called = []

    @eager_app.app.task(name="linked", shared=False)
    def linked(value: str) -> None:
        called.append(value)

    def body(self: IdempotentTask) -> None:
        lose(eager_app, self)
        self.session.add(Effect(name="paid"))
        self.session.flush()
        if end == "error":
            raise ValueError("no")
        if end == "ignore":
            raise Ignore

    task = eager_app.task(body)
    result = task.apply(message_id="m", link=eager_app.app.tasks["linked"].s())

    assert result.state == states.IGNORED
    assert eager_app.effects.names() == []
    row = eager_app.row(task)
    assert (row.status, row.token, row.worker) == (Status.PROCESSING, 2, "other")
    assert called == []
    assert "its lease ran out before the body ended, and another delivery owns the message" in caplog.text
    assert "what its body wrote in its transaction was rolled back" in caplog.text


# -- the transaction is not the body's to end --------------------------------------------------------------------------


def commit_session(task: IdempotentTask) -> None:
    task.session.commit()


def commit_connection(task: IdempotentTask) -> None:
    task.connection.commit()


def begin_and_commit(task: IdempotentTask) -> None:
    with task.session.begin_nested():
        task.session.add(Effect(name="nested"))
    task.session.get_transaction().commit()  # type: ignore[union-attr]


@pytest.mark.parametrize("end", [commit_session, commit_connection, begin_and_commit])
@pytest.mark.parametrize("caught", [False, True])
def test_a_commit_of_the_bodys_own_is_an_error(
    eager_app: EagerApp, end: Callable[[IdempotentTask], None], caught: bool
) -> None:
    def body(self: IdempotentTask) -> None:
        self.session.add(Effect(name="paid"))
        self.session.flush()
        try:
            end(self)
        except IdempotentError:
            if not caught:
                raise

    done = eager_app.run(body)

    assert isinstance(done.result.result, IdempotentError)
    assert caught or "leave commit() out" in str(done.result.result)
    assert ending(done.row) == (Status.DONE, FAILURE)
    assert eager_app.effects.names() == []


def roll_back_session(task: IdempotentTask) -> None:
    task.session.rollback()


def roll_back_connection(task: IdempotentTask) -> None:
    task.connection.rollback()


def close_session(task: IdempotentTask) -> None:
    task.session.close()


def catch_a_failed_flush(task: IdempotentTask) -> None:
    there = task.session.scalars(sa.select(Effect.id)).one()
    task.session.expunge_all()
    task.session.add(Effect(id=there, name="the same key"))
    with pytest.raises(IntegrityError):
        task.session.flush()


@pytest.mark.parametrize("end", [roll_back_session, roll_back_connection, close_session, catch_a_failed_flush])
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_rollback_of_the_bodys_own_is_not_overlooked(
    eager_app: EagerApp, end: Callable[[IdempotentTask], None], goes_on: bool
) -> None:
    def body(self: IdempotentTask) -> None:
        self.session.add(Effect(name="paid"))
        self.session.flush()
        end(self)
        if goes_on:
            self.connection.execute(sa.insert(Effect).values(name="and again", value=0))

    done = eager_app.run(body)

    assert isinstance(done.result.result, IdempotentError)
    assert "ended its transaction itself" in str(done.result.result)
    assert ending(done.row) == (Status.DONE, FAILURE)
    assert eager_app.effects.names() == []


def test_a_savepoint_undoes_a_part(eager_app: EagerApp) -> None:
    def body(self: IdempotentTask) -> None:
        self.session.add(Effect(name="kept"))
        nested = self.session.begin_nested()
        self.session.add(Effect(name="undone"))
        nested.rollback()
        with self.session.begin_nested():
            self.session.add(Effect(name="kept too"))

    done = eager_app.run(body)

    assert ending(done.row) == (Status.DONE, SUCCESS)
    assert eager_app.effects.names() == ["kept", "kept too"]


def test_after_a_retry_the_body_has_no_transaction(eager_app: EagerApp, caplog: pytest.LogCaptureFixture) -> None:
    errors = []

    def body(self: IdempotentTask) -> None:
        self.session.add(Effect(name="paid"))
        run = Run.of(self.request_stack.top)
        assert run is not None
        # As retry(throw=False) does it, which in eager mode does nothing.
        assert run.hand_on(NewMessage(run.key, self.request.id, attempt=1))
        with pytest.raises(IdempotentError, match="the transaction of this atomic body is over") as caught:
            _ = self.session
        errors.append(caught)

    done = eager_app.run(body)

    assert errors
    assert (ending(done.row), done.row.attempt) == ((Status.PENDING, None), 1)
    assert eager_app.effects.names() == []


# -- elsewhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
class TestElsewhere:
    @pytest.mark.parametrize("name", ["session", "connection"])
    def test_a_direct_call_has_no_transaction(self, eager_app: EagerApp, name: str) -> None:
        task = eager_app.task(lambda self: getattr(self, name))
        with pytest.raises(
            IdempotentError, match=f"no {name} here: an atomic task has one only while a worker, or apply"
        ):
            task()
        with pytest.raises(IdempotentError, match=f"no {name} here"):
            getattr(task, name)

    def test_nor_has_a_task_that_is_not_atomic(self, eager_app: EagerApp) -> None:
        done = eager_app.run(lambda self: self.session, atomic=False)
        assert "it is not atomic: give it the option atomic=True" in str(done.result.result)

    def test_a_task_may_have_its_own(self, eager_app: EagerApp) -> None:
        class Ours(IdempotentTask):
            abstract = True
            connection = "of the class"  # type: ignore[assignment]

        task: Any = eager_app.task(lambda self: (self.connection, self.session), base=Ours, atomic=False)
        task.session = "of the instance"
        assert task.apply().get() == ("of the class", "of the instance")

    def test_the_store_has_to_have_transactions(self, eager_app: EagerApp) -> None:
        class Plain:
            """The port, without what is beyond it."""

            def __init__(self, store: SQLStore) -> None:
                self._store = store

            def __getattr__(self, name: str) -> Any:
                if name in {"within", "engine", "gave_way"}:
                    raise AttributeError(name)
                return getattr(self._store, name)

        store = eager_app.store
        QueueLog(eager_app.app, store=Plain(store))

        done = eager_app.run(pay)

        assert isinstance(done.result.result, ConfigurationError)
        assert "Plain has none" in str(done.result.result)
        assert ending(done.row) == (Status.DONE, FAILURE)
        store.close()

    def test_an_in_memory_database_is_refused(
        self, eager_app: EagerApp, open_eager_app: Callable[..., EagerApp]
    ) -> None:
        done = open_eager_app(SQLStore("sqlite://")).run(pay)
        assert isinstance(done.result.result, ConfigurationError)
        assert "an in-memory SQLite is one connection; use a file" in str(done.result.result)

    def test_a_worker_with_such_a_store_does_not_start(
        self, eager_app: EagerApp, open_eager_app: Callable[..., EagerApp]
    ) -> None:
        mine = open_eager_app(SQLStore("sqlite://"))
        mine.task(pay)
        step = CheckStep.__new__(CheckStep)
        with pytest.raises(ConfigurationError, match="an in-memory SQLite is one connection"):
            step.include_if(SimpleNamespace(app=mine.app, pool_cls=TaskPool))

    @pytest.mark.parametrize("atomic", [False, True])
    def test_without_a_store_it_does_not_run(
        self, open_eager_app: Callable[..., EagerApp], store_url: str, atomic: bool
    ) -> None:
        """Whatever the app says of tasks that are only guarded."""

        class Silent(SQLStore):
            def claim(self, *args: Any, **kwargs: Any) -> Any:
                raise StoreUnavailableError("gone")

        eager_app = open_eager_app(Silent(store_url))
        eager_app.app.conf.idempotent_on_store_error = "run"
        runs: list[int] = []

        result = eager_app.task(lambda self: runs.append(1), atomic=atomic).apply(message_id="m")

        assert runs == ([] if atomic else [1])
        assert result.state == (states.FAILURE if atomic else states.SUCCESS)
        assert not atomic or isinstance(result.result, StoreUnavailableError)

    def test_an_engine_in_autocommit_is_refused(
        self, eager_app: EagerApp, open_eager_app: Callable[..., EagerApp], store_url: str
    ) -> None:
        for engine in (
            sa.create_engine(store_url, isolation_level="AUTOCOMMIT"),
            sa.create_engine(store_url).execution_options(isolation_level="AUTOCOMMIT"),
        ):
            done = open_eager_app(SQLStore(engine)).run(pay, message_id=str(id(engine)))
            assert isinstance(done.result.result, ConfigurationError)
            assert "is in autocommit" in str(done.result.result)
            engine.dispose()
        assert eager_app.effects.names() == []


# -- the user's own ----------------------------------------------------------------------------------------------------


class OurSession(Session):
    pass


@pytest.mark.parametrize("scoped", [False, True])
def test_a_session_factory_is_used(open_eager_app: Callable[..., EagerApp], store_url: str, scoped: bool) -> None:
    engine = sa.create_engine("sqlite://")  # which is not used
    commits: list[Session] = []
    factory: Any = sessionmaker(engine, class_=OurSession, expire_on_commit=False, binds={Effect: engine})
    sa.event.listen(factory, "after_commit", commits.append)
    scope = scoped_session(factory)
    eager_app = open_eager_app(SQLStore(store_url), session_factory=scope if scoped else factory)
    sessions: list[Session] = []

    def body(self: IdempotentTask) -> Effect:
        sessions.append(self.session)
        effect = Effect(name="paid")
        self.session.add(effect)
        return effect

    done = eager_app.run(body, keep_result=False)

    assert isinstance(sessions[0], OurSession)
    assert done.result.get().name == "paid"  # it did not expire
    assert eager_app.effects.names() == ["paid"]
    assert commits == sessions
    assert not scope.registry.has()
    engine.dispose()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_session_factory_that_goes_its_own_way_is_refused(
    open_eager_app: Callable[..., EagerApp], store_url: str
) -> None:
    other = sa.create_engine(store_url)

    class Elsewhere(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> sa.Engine:
            return other

    eager_app = open_eager_app(SQLStore(store_url), session_factory=sessionmaker(class_=Elsewhere))

    done = eager_app.run(pay)

    assert isinstance(done.result.result, ConfigurationError)
    assert "do not keep to the connection they are given" in str(done.result.result)
    assert eager_app.effects.names() == []
    other.dispose()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_session_factory_must_be_callable(eager_app: EagerApp) -> None:
    with pytest.raises(ConfigurationError, match="takes a sessionmaker, not Session"):
        QueueLog(eager_app.app, session_factory=Session())  # type: ignore[arg-type]


@pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)
@pytest.mark.parametrize("level", ["SERIALIZABLE", "READ COMMITTED"])
def test_the_isolation_level_is_used(open_eager_app: Callable[..., EagerApp], store_url: str, level: str) -> None:
    eager_app = open_eager_app(SQLStore(store_url), isolation_level=level)

    def body(self: IdempotentTask) -> str:
        self.session.add(Effect(name="paid"))
        return self.connection.get_isolation_level()

    assert eager_app.run(body).result.get() == level
    assert eager_app.effects.names() == ["paid"]
    with eager_app.store.engine.connect() as connection:  # what the next one gets is the engine's own
        assert connection.get_isolation_level() == connection.default_isolation_level


def test_an_engine_shared_with_the_app(open_eager_app: Callable[..., EagerApp], store_url: str) -> None:
    engine = sa.create_engine(store_url)
    eager_app = open_eager_app(SQLStore(engine))

    def body(self: IdempotentTask) -> bool:
        self.session.add(Effect(name="paid"))
        return self.connection.engine is engine

    assert eager_app.run(body).result.get() is True
    with Session(engine) as session:  # nothing of ours is in its way
        session.add(Effect(name="by hand"))
        session.commit()
    assert eager_app.effects.names() == ["by hand", "paid"]
    engine.dispose()
