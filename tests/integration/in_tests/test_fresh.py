"""Every test has a fresh queue log, and no real one is written."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.integration.in_tests.conftest import RunTests
from tests.support.worker import ROOT


def test_each_test_has_a_fresh_log_in_memory(run_tests: RunTests, tmp_path: Path) -> None:
    for _ in range(2):  # the second run is as green as the first
        run_tests(
            test_shop="""
            import pytest
            from celery import Celery
            from celery_idempotent import IdempotentTask, QueueLog, RedisStore
            from shop import RUNS, charge, resize

            @pytest.fixture(scope="module", autouse=True)
            def before_all_tests():
                charge.delay("of the module", 1)

            @pytest.fixture
            def order():
                return charge.delay("o-1", 500)

            @pytest.mark.parametrize("number", range(3))
            def test_a_call_runs_in_each_test(order, queue_log, number):
                assert not order.duplicate
                assert charge.delay("o-1", 500).duplicate
                assert RUNS.count("o-1") == number + 1
                assert queue_log.message(order).duplicates == 1

            def app_of(name, **settings):
                app = Celery(name, set_as_current=False)
                app.conf.update(task_always_eager=True, **settings)
                @app.task(base=IdempotentTask, name="plain", message_id=lambda: "m", shared=False)
                def plain(): ...
                return app

            @pytest.mark.parametrize("number", range(2))
            def test_apps_that_are_made_in_tests(number):
                app, other = app_of("a"), app_of("b", idempotent_store="redis://nowhere.invalid/0")
                given = app_of("c")
                QueueLog(given, store=RedisStore("redis://nowhere.invalid/0"))
                for each in (app, other, given):
                    assert [each.tasks["plain"].delay().duplicate for _ in range(2)] == [False, True]

            @pytest.mark.parametrize("number", range(2))
            def test_two_apps_with_one_address_have_one_log(number):
                app, other = app_of("a"), app_of("b")
                assert [each.tasks["plain"].delay().duplicate for each in (app, other)] == [False, True]
            """
        )
    assert [path.name for path in (tmp_path / "project").glob("*.db")] == []


def test_the_option_leaves_each_app_its_own_store(run_tests: RunTests, tmp_path: Path) -> None:
    tests = """
    from shop import RUNS, charge

    def test_a_call(queue_log):
        charge.delay("o-1", 500)
        assert RUNS == ["o-1"]
        assert queue_log.message(charge, "o-1", 500).status == "done"
    """
    run_tests(ini="idempotent_fresh_log = false", test_shop=tests)
    assert "assert [] == ['o-1']" in run_tests(ini="idempotent_fresh_log = false", fails=True, test_shop=tests)
    assert rows(tmp_path / "project" / "real.db") == ["order:o-1"]


def rows(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [key for (key,) in connection.execute("SELECT message_id FROM queue_log ORDER BY 1")]


SHARED = """
import sqlalchemy as sa
from celery import Celery
from celery_idempotent import IdempotentTask, QueueLog, SQLStore

engine = sa.create_engine({url!r})
app = Celery("shop", broker="memory://", backend="cache+memory://")
app.conf.update(task_always_eager=True)
QueueLog(app, store=SQLStore(engine))
RUNS = []

@app.task(base=IdempotentTask, message_id="order:{{order_id}}")
def charge(order_id):
    RUNS.append(order_id)

@app.task(base=IdempotentTask, message_id="settle:{{order_id}}", atomic=True, bind=True)
def settle(self, order_id):
    self.session.execute(sa.text("INSERT INTO payment VALUES (:id)"), {{"id": order_id}})
    charge.delay(f"of {{order_id}}")
"""


@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
def test_a_shared_database_keeps_what_no_test_has_written(run_tests: RunTests, store_url: str, tmp_path: Path) -> None:
    engine = sa.create_engine(store_url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE payment (id VARCHAR(9))"))
    (tmp_path / "real.py").write_text(f"{SHARED.format(url=store_url)}\napp.queue_log.init()\ncharge.delay('real')\n")
    subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "real.py")],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    for _ in range(2):
        run_tests(
            shop=SHARED.format(url=store_url),
            test_shop="""
            import pytest
            import sqlalchemy as sa
            from sqlalchemy.orm import Session
            from celery_idempotent import outbox
            from shop import RUNS, app, charge, engine, settle

            @pytest.mark.parametrize("number", range(2))
            def test_it_is_emptied(queue_log, number):
                assert charge.delay("real").duplicate
                assert not charge.delay("o-1").duplicate
                assert RUNS.count("o-1") == number + 1
                assert [row.key.message_id for row in queue_log.messages()] == ["order:o-1"]

            @pytest.mark.parametrize("number", range(2))
            def test_atomic_bodies_and_their_calls(queue_log, number):
                assert settle.delay("o-2").get() is None
                assert sorted(row.key.message_id for row in queue_log.messages()) == ["order:of o-2", "settle:o-2"]
                with engine.connect() as connection:
                    assert connection.scalar(sa.text("SELECT count(*) FROM payment WHERE id = 'o-2'")) > number

            @pytest.mark.parametrize("number", range(2))
            def test_an_outbox(queue_log, number):
                with Session(engine) as session, outbox(session):
                    charge.delay("o-3")
                    assert RUNS.count("o-3") == number
                    session.commit()
                assert RUNS.count("o-3") == number + 1
                assert queue_log.message(charge, "o-3").status == "done"
            """,
        )
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT message_id FROM queue_log")).scalars().all() == ["order:real"]


def test_an_outbox_finds_its_log_by_the_first_call(run_tests: RunTests, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'test.db'}"
    program = SHARED.format(url=url).replace(
        "QueueLog(app, store=SQLStore(engine))", f"app.conf.idempotent_store = {url!r}"
    )
    run_tests(
        shop=program.replace(", atomic=True", ""),
        test_shop="""
        import pytest
        from sqlalchemy.orm import Session
        from celery_idempotent import outbox
        from shop import RUNS, charge, engine

        @pytest.mark.parametrize("number", range(2))
        def test_it(queue_log, number):
            with Session(engine) as session, outbox(session):
                charge.delay("o-1")
                session.commit()
            assert RUNS == ["o-1"] * (number + 1)
            assert charge.delay("o-1").duplicate
            assert queue_log.message(charge, "o-1").duplicates == 1

        def test_a_rollback(queue_log):
            with Session(engine) as session, outbox(session):
                charge.delay("o-1")
            assert queue_log.messages() == []
        """,
    )
    assert rows(tmp_path / "test.db") == []
