"""The table over time: it is taken to the next version while it is used, and code one version older goes on on the newer table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import sqlalchemy as sa

from celery_idempotent.core.records import Claimed, Inserted, MessageKey, NewMessage, Status
from celery_idempotent.core.store import Change, Store
from celery_idempotent.errors import SchemaError
from celery_idempotent.stores.sql import SQLStore, queue_log_table
from celery_idempotent.stores.sql.online import alone
from celery_idempotent.testing.examples import KEY, claim, done, new_message, pending, read
from tests.support.apps import AppSpec, OpenApp
from tests.support.apps.newer import CHANGES, newer
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import StartWorker

WRITTEN = Path(__file__).with_name("versions")
_KEY = f"message_id = '{KEY.message_id}' AND task_name = '{KEY.task_name}'"

on_servers = pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)
on_postgresql = pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)


@pytest.fixture
def engine(store_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(store_url, poolclass=sa.NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def first(engine: sa.Engine) -> sa.Engine:
    """Return a database with a table of the first version, as it was made, and a message that was done."""
    kind = engine.dialect.name.replace("mysql", "mariadb")
    with engine.begin() as connection:
        for statement in (WRITTEN / f"1.{kind}.sql").read_text().split(";\n"):
            if statement.strip():
                connection.execute(sa.text(statement))
        moment = "'2026-11-22 13:00:00'"
        connection.execute(
            sa.text(
                "INSERT INTO queue_log (message_id, task_name, status, processed_status, created_timestamp, processed_timestamp, "
                "task_id, attempt, token, duplicates, takeovers) "
                f"VALUES ('old', 'shop.charge', 'done', 'success', {moment}, {moment}, 'old', 0, 1, 0, 0)"
            )
        )
    return engine


@pytest.fixture
def next_version() -> Iterator[None]:
    with newer():
        yield


def next_init(url: str) -> bool:
    """Return the next version's ``init``."""
    with newer(), closing(SQLStore(url)) as store:
        return store.init()


def shape(engine: sa.Engine) -> tuple[list[str], dict[str | None, list[str | None]]]:
    found = sa.inspect(engine)
    return [column["name"] for column in found.get_columns("queue_log")], {
        index["name"]: index["column_names"] for index in found.get_indexes("queue_log")
    }


def without_index(engine: sa.Engine) -> None:
    """Drop one of the table's indexes."""
    on = " ON queue_log" if engine.dialect.name == "mysql" else ""
    with engine.begin() as connection:
        connection.execute(sa.text(f"DROP INDEX queue_log_open{on}"))


def expected() -> tuple[list[str], dict[str | None, list[str | None]]]:
    table = queue_log_table(sa.MetaData())
    return list(table.columns.keys()), {index.name: list(index.columns.keys()) for index in table.indexes}


# -- from one version to the next ----------------------------------------------------------------------------------------------


def test_a_table_of_one_version_is_taken_to_the_next(first: sa.Engine, store_url: str) -> None:
    seen: list[Change] = []
    with newer(), closing(SQLStore(store_url)) as store:
        would = store.outstanding()
        assert store.init(before=seen.append)
        assert seen == would
        assert [change.what for change in seen] == CHANGES
        assert all(change.alters for change in seen)
        assert (store.outstanding(), store.init()) == ([], False)
        assert read(store, MessageKey("old", "shop.charge")).status is Status.DONE
        assert shape(first) == expected()


@on_servers
def test_all_goes_on_without_an_index(first: sa.Engine, store_url: str) -> None:
    without_index(first)
    with closing(SQLStore(store_url)) as store:
        assert [change.what for change in store.outstanding()] == ["create the index queue_log_open"]
        store.check()
        assert store.inspect()
        assert store.record(new_message()) == Inserted()
    assert "queue_log_open" not in shape(first)[1]


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_file_is_taken_to_this_version_by_its_first_use(first: sa.Engine, store_url: str) -> None:
    without_index(first)
    with closing(SQLStore(store_url)) as store:
        assert store.inspect()
        assert shape(first) != expected(), "looking at it changes nothing"
        pending(store)
        assert shape(first) == expected()
    with newer(), closing(SQLStore(store_url)) as store:
        assert len(store.outstanding()) == len(CHANGES)
        with pytest.raises(SchemaError, match="lacks tenant, weight"):
            store.inspect()
        assert shape(first) != expected(), "looking at it changes nothing"
        assert store.find(KEY) is not None
        assert shape(first) == expected()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_missing_file_is_reported_with_what_would_be_made(store_url: str) -> None:
    with closing(SQLStore(store_url)) as store:
        assert store.outstanding()[0].what == "create the table queue_log"
        assert not any(change.alters for change in store.outstanding())
    assert not Path(str(sa.make_url(store_url).database)).exists()


@on_servers
def test_another_schema_and_another_name_work(store_url: str, engine: sa.Engine) -> None:
    mariadb = engine.dialect.name != "postgresql"
    namespace = f"{sa.make_url(store_url).database}_ns" if mariadb else "versions_ns"
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {namespace}"))
    try:
        with closing(SQLStore(store_url, table=f"{namespace}.Messages")) as store:
            assert store.init()
            with newer(), closing(SQLStore(store_url, table=f"{namespace}.Messages")) as other:
                assert [change.what for change in other.outstanding()] == [
                    f"add the column tenant to {namespace}.Messages",
                    f"add the column weight to {namespace}.Messages",
                    "create the index Messages_tenant",
                ]
                assert other.init()
                other.check()
            pending(store)
            assert store.outstanding() == []
    finally:
        with engine.begin() as connection:
            connection.execute(sa.text(f"DROP SCHEMA {namespace} {'' if mariadb else 'CASCADE'}"))


@pytest.mark.usefixtures("next_version")
def test_many_may_do_it_at_once(first: sa.Engine, store_url: str) -> None:
    stores = [SQLStore(store_url) for _ in range(4)]
    start = Barrier(len(stores))

    def init(store: SQLStore) -> bool:
        start.wait(30)
        return store.init()

    with ThreadPoolExecutor(len(stores)) as threads:
        changed = list(threads.map(init, stores))

    assert any(changed)
    for store in stores:
        assert store.outstanding() == []
        store.close()
    assert shape(first) == expected()


# -- while it is used -----------------------------------------------------------------------------------------------------------


def blocked(engine: sa.Engine) -> bool:
    """Return whether somebody waits for the table."""
    statement = (
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%queue_log%' "
        "AND datname = current_database() AND query NOT LIKE '%pg_stat_activity%'"
        if engine.dialect.name == "postgresql"
        else "SELECT count(*) FROM information_schema.processlist WHERE db = DATABASE() AND state LIKE '%metadata lock%'"
    )
    with engine.connect() as connection:
        return bool(connection.scalar(sa.text(statement)))


@on_servers
@pytest.mark.parametrize("what", ["an index", "a column"])
def test_it_waits_for_a_body_and_blocks_no_other(store_url: str, engine: sa.Engine, what: str) -> None:
    """An atomic body holds the table for minutes; a lock on all of it must not hold up the others meanwhile."""
    with closing(SQLStore(store_url)) as store, ThreadPoolExecutor(1) as threads, engine.connect() as body:
        store.init()
        done(store)
        if what == "an index":
            without_index(engine)
        body.execute(sa.text(f"UPDATE queue_log SET duplicates = 1 WHERE {_KEY}"))
        init = threads.submit(store.init) if what == "an index" else threads.submit(next_init, store_url)
        wait_until(lambda: init.done() or blocked(engine), describe="init at the table")
        slowest = 0.0
        for number in range(8):
            began = time.monotonic()
            message = NewMessage(MessageKey(f"m{number}", "t"), f"m{number}")
            assert store.record(message) == Inserted()
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 5.0
        body.commit()
        assert init.result(TIMEOUT)
        columns, indexes = shape(engine)
        assert "queue_log_open" in indexes if what == "an index" else "tenant" in columns


@on_postgresql
def test_a_half_built_index_is_rebuilt(store_url: str, engine: sa.Engine) -> None:
    with closing(SQLStore(store_url)) as store, engine.connect() as body:
        store.init()
        pending(store)
        without_index(engine)
        body.execute(sa.text("UPDATE queue_log SET duplicates = 1"))
        impatient = sa.create_engine(store_url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        with impatient.connect() as connection:
            connection.execute(sa.text("SET statement_timeout = '200ms'"))
            with pytest.raises(sa.exc.OperationalError, match="statement timeout"):
                connection.execute(
                    sa.text("CREATE INDEX CONCURRENTLY queue_log_open ON queue_log (status, queue, published_at)")
                )
        impatient.dispose()
        body.rollback()

        assert [change.what for change in store.outstanding()] == [
            "drop the index queue_log_open, which was not built to the end",
            "create the index queue_log_open",
        ]
        assert store.init()
        assert store.outstanding() == []


@on_postgresql
def test_a_build_does_not_wait_for_those_who_wait_for_it(store_url: str, engine: sa.Engine) -> None:
    with closing(SQLStore(store_url)) as store, ThreadPoolExecutor(1) as threads, engine.connect() as connection:
        store.init()
        connection.execution_options(isolation_level="AUTOCOMMIT")
        with alone(connection, queue_log_table(sa.MetaData())):
            waiting = threads.submit(next_init, store_url)
            time.sleep(1.5)  # it asks often enough for psycopg to give the question a name
            assert not waiting.done()
            connection.execute(sa.text("SET statement_timeout = '15s'"))
            connection.execute(sa.text("CREATE INDEX CONCURRENTLY another ON queue_log (queue)"))
        assert waiting.result(TIMEOUT)


@on_postgresql
def test_a_table_in_another_schema_is_not_waited_for(store_url: str, engine: sa.Engine) -> None:
    url = sa.make_url(store_url).update_query_dict({"options": "-csearch_path=beside_ns"})
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA beside_ns"))
    try:
        with closing(SQLStore(store_url)) as store, closing(SQLStore(url)) as other, ThreadPoolExecutor(1) as threads:
            store.init()
            with engine.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT")
                with alone(connection, queue_log_table(sa.MetaData())):
                    assert threads.submit(other.init).result(TIMEOUT)
    finally:
        with engine.begin() as connection:
            connection.execute(sa.text("DROP SCHEMA beside_ns CASCADE"))


# -- code of one version while the next one runs ---------------------------------------------------------------------------------


def test_older_code_goes_on_on_a_newer_table(store_url: str) -> None:
    """Each reads what the other has written, and what one has claimed the other takes over."""
    with closing(SQLStore(store_url)) as old:
        old.init()
        old.record(new_message(MessageKey("before", "t")))
        held = claim(old)
        assert next_init(store_url)
        with newer(), closing(SQLStore(store_url)) as new:
            new.check()
            both: list[Store] = [old, new]
            assert old.complete(held, result=b"1")
            assert [read(store).result for store in both] == [b"1", b"1"]
            for number, (here, there) in enumerate([(old, new), (new, old)]):
                message = new_message(MessageKey(f"m{number}", "t"))
                assert here.record(message) == Inserted()
                assert not isinstance(there.record(message), Inserted)
                claimed = there.claim(message, worker="w:1", lease=60.0, grace=0.0)
                assert isinstance(claimed, Claimed)
                assert there.expire(claimed.claim)
                row = read(here, message.key)
                taken = here.take_over(row, task_id="again", worker="w:2", lease=60.0, attempt=0)
                assert isinstance(taken, Claimed)
                assert not there.complete(claimed.claim, result=b"late")
                assert here.fail(taken.claim, error="no")
                assert there.resubmit(read(there, message.key), replace(message, task_id="anew"))
                assert here.forget(read(here, message.key))
            assert old.counts() == new.counts()
            old.close()
            old.check()  # a process that starts only now
            assert old.outstanding() == []
            assert not old.init()
            assert [column["name"] for column in sa.inspect(new.engine).get_columns("queue_log")][-2:] == [
                "tenant",
                "weight",
            ]


@on_servers
def test_newer_code_refuses_an_older_table_and_names_what_it_lacks(store_url: str) -> None:
    with closing(SQLStore(store_url)) as old:
        old.init()
        with newer(), closing(SQLStore(store_url)) as new:
            calls: list[Callable[[], object]] = [new.check, new.inspect, lambda: new.record(new_message())]
            for call in calls:
                with pytest.raises(SchemaError, match=r"lacks tenant, weight: it is of an older version; run `celery"):
                    call()
        assert old.find(KEY) is None


@on_postgresql
@pytest.mark.parametrize("broker", ["redis"], indirect=True)
def test_workers_of_both_versions(spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, store_url: str) -> None:
    """An older worker works on while the table is taken to the next version, and a newer one does not start before."""
    app = open_app(spec)
    older = start_worker(spec)
    assert app.tasks["echo"].delay("before").get(timeout=TIMEOUT) == "before"
    newer_spec = replace(spec, queue=f"{spec.queue}-newer", tasks=("tests.support.apps.newer",))
    refused = start_worker(newer_spec, wait=False)
    refused.wait_for_log("lacks tenant, weight: it is of an older version; run `celery -A proj idempotent init`")
    wait_until(lambda: not refused.is_alive, describe="the end of the worker")

    assert next_init(store_url)

    assert app.tasks["echo"].delay("behind").get(timeout=TIMEOUT) == "behind"
    start_worker(newer_spec)
    assert app.tasks["echo"].apply_async(("new",), queue=newer_spec.queue).get(timeout=TIMEOUT) == "new"
    assert older.is_alive


@on_postgresql
@pytest.mark.parametrize("broker", ["redis"], indirect=True)
def test_a_message_waits_while_the_table_is_too_old(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, store_url: str, engine: sa.Engine
) -> None:
    """A wrong migration, a restored backup: the caller gets an error, and deliveries come again until they can be claimed."""

    def rename(column: str, name: str) -> None:
        with engine.begin() as connection:
            connection.execute(sa.text(f"ALTER TABLE queue_log RENAME COLUMN {column} TO {name}"))

    app = open_app(spec)
    gate = Path(spec.ledger).with_name("gate")
    worker = start_worker(spec, concurrency=1)
    runs = app.tasks["gated"].delay(str(gate))
    waits = app.tasks["echo"].delay("waits")
    wait_until(lambda: app.queue_log.store.find(MessageKey(runs.id, "gated")).token, describe="it")
    rename("takeovers", "taken")
    with pytest.raises(SchemaError, match="takeovers"):
        app.tasks["echo"].delay("refused")
    gate.touch()
    assert runs.get(timeout=TIMEOUT) is None
    worker.wait_for_log("is delivered again in 10 s, the store gives no answer: the table queue_log lacks takeovers")
    rename("taken", "takeovers")
    assert waits.get(timeout=TIMEOUT) == "waits"
    assert app.queue_log.store.find(MessageKey(waits.id, "echo")).status is Status.DONE
