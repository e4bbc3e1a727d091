"""SQLite, whose driver for Python begins a transaction late: on engines of ours, and on those of a user, however they begin theirs."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from celery_idempotent import IdempotentTask, SQLStore, outbox
from celery_idempotent.core.records import MessageKey, ProcessedStatus, Status
from tests.integration.worker.atomic.conftest import EagerApp
from tests.support.effects import Effect, Effects

pytestmark = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


def plain(url: str) -> sa.Engine:
    return sa.create_engine(url, connect_args={"timeout": 30.0})


def recipe(url: str, words: str = "BEGIN") -> sa.Engine:
    """As SQLAlchemy's documentation has it."""
    engine = plain(url)

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, record: object) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        connection.exec_driver_sql(words)

    return engine


def immediate(url: str) -> sa.Engine:
    return recipe(url, "BEGIN IMMEDIATE")


def without(url: str) -> sa.Engine:
    """Begin no transaction, not even by the driver."""
    return sa.create_engine(url, connect_args={"timeout": 30.0, "isolation_level": None})


def always(url: str) -> sa.Engine:
    """Have the driver begin a transaction as soon as there is none."""
    return sa.create_engine(url, connect_args={"timeout": 30.0, "autocommit": False})


MAKES = [plain, recipe, immediate, without, *([always] if sys.version_info >= (3, 12) else [])]

users = pytest.mark.parametrize("make", MAKES)


@pytest.fixture(params=["ours", *MAKES], ids=lambda made: getattr(made, "__name__", made))
def target(request: pytest.FixtureRequest, store_url: str) -> Iterator[str | sa.Engine]:
    if request.param == "ours":
        yield store_url
        return
    engine = request.param(store_url)
    yield engine
    engine.dispose()


@pytest.fixture
def eager_app_on_target(open_eager_app: Callable[..., EagerApp], target: str | sa.Engine) -> EagerApp:
    return open_eager_app(SQLStore(target))


def test_a_body_whose_first_write_is_in_a_savepoint_is_atomic(eager_app_on_target: EagerApp) -> None:
    def body(self: IdempotentTask) -> None:
        with self.session.begin_nested():
            self.session.add(Effect(name="paid"))
        raise ZeroDivisionError

    done = eager_app_on_target.run(body)

    assert done.row.processed_status is ProcessedStatus.FAILURE
    assert eager_app_on_target.effects.names() == []


def test_a_released_savepoint_commits_with_the_rest(eager_app_on_target: EagerApp) -> None:
    def body(self: IdempotentTask) -> None:
        with self.session.begin_nested():
            self.session.add(Effect(name="paid"))
        savepoint = self.session.begin_nested()
        self.session.add(Effect(name="undone"))
        self.session.flush()
        savepoint.rollback()
        assert eager_app_on_target.effects.names() == []
        self.session.add(Effect(name="told"))

    done = eager_app_on_target.run(body)

    assert done.row.processed_status is ProcessedStatus.SUCCESS
    assert eager_app_on_target.effects.names() == ["paid", "told"]


@pytest.mark.parametrize("level", [None, "SERIALIZABLE"])
def test_bodies_that_read_and_then_write_lose_no_update(
    open_eager_app: Callable[..., EagerApp], target: str | sa.Engine, level: str | None
) -> None:
    eager_app = open_eager_app(SQLStore(target), isolation_level=level)
    eager_app.effects.put("account")
    times = 5
    together = threading.Barrier(2)

    def body(self: IdempotentTask) -> None:
        effect = self.session.scalars(sa.select(Effect).where(Effect.name == "account")).one()
        with_the_other()
        effect.value += 1

    def with_the_other() -> None:
        try:
            together.wait(0.2)
        except threading.BrokenBarrierError:
            together.reset()

    task = eager_app.task(body)

    def work(worker: int) -> None:
        for number in range(times):
            task.apply(message_id=f"{worker}-{number}").get()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert eager_app.effects.value("account") == 2 * times


def test_verbs_on_an_engine_stand_for_themselves(eager_app_on_target: EagerApp, store_url: str) -> None:
    charge = eager_app_on_target.task(lambda self, order: order, name="charge", atomic=False, message_id="{order}")

    assert charge.delay("o-1").get() == "o-1"
    assert charge.delay("o-1").duplicate

    other = SQLStore(store_url)
    row = other.find(MessageKey("o-1", charge.name))
    assert row is not None
    assert (row.status, row.duplicates) == (Status.DONE, 1)
    other.close()


@users
def test_an_engine_is_given_back_as_it_was(store_url: str, make: Callable[[str], sa.Engine]) -> None:
    engine = make(store_url)

    def state() -> tuple[Any, ...]:
        with engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            return driver.isolation_level, driver.in_transaction

    before = state()
    store = SQLStore(engine)
    assert store.find(MessageKey("o-1", "charge")) is None
    assert state() == before
    engine.dispose()


@users
@pytest.mark.parametrize("how", ["session", "session that has begun", "connection"])
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_an_outbox_whose_first_write_is_in_a_savepoint_is_atomic(
    eager_app: EagerApp, store_url: str, make: Callable[[str], sa.Engine], how: str, end: str
) -> None:
    charge = eager_app.task(lambda self, order: order, name="charge", atomic=False, message_id="{order}")
    engine = make(store_url)
    with engine.connect() if how == "connection" else Session(engine) as owner:
        if how == "session that has begun":
            owner.execute(sa.select(Effect.id)).all()
        with outbox(owner):
            with owner.begin_nested():
                owner.execute(sa.insert(Effect).values(name="paid", value=0))
                charge.delay("o-1")
            assert eager_app.effects.names() == []
            getattr(owner, end)()
    committed = end == "commit"
    assert eager_app.effects.names() == (["paid"] if committed else [])
    assert (eager_app.store.find(MessageKey("o-1", charge.name)) is not None) is committed
    engine.dispose()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_an_asynchronous_session_whose_first_write_is_in_a_savepoint_is_atomic(
    eager_app: EagerApp, effects: Effects, store_url: str, end: str
) -> None:
    charge = eager_app.task(lambda self, order: order, name="charge", atomic=False, message_id="{order}")

    def record(session: Session) -> None:
        with outbox(session), session.begin_nested():
            session.add(Effect(name="paid"))
            session.flush()
            charge.delay("o-1")

    async def work() -> None:
        engine = create_async_engine(store_url.replace("sqlite:", "sqlite+aiosqlite:"))
        async with AsyncSession(engine) as session:
            await session.run_sync(record)
            assert effects.names() == []
            await getattr(session, end)()
        await engine.dispose()

    asyncio.run(work())
    committed = end == "commit"
    assert effects.names() == (["paid"] if committed else [])
    assert (eager_app.store.find(MessageKey("o-1", charge.name)) is not None) is committed
