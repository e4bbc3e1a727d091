"""The table is made once, even by several processes; a missing or old one is named in the error."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import CreateTable

from celery_idempotent.core.records import Inserted
from celery_idempotent.core.store import Store
from celery_idempotent.errors import SchemaError
from celery_idempotent.stores.sql import SQLStore, queue_log_table
from celery_idempotent.testing.examples import KEY, new_message, pending

on_servers = pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)


@on_servers
def test_a_missing_table_is_named_and_how_to_make_it(store_url: str) -> None:
    store = SQLStore(store_url, table="messages")
    calls: list[Callable[[], object]] = [
        store.check,
        store.counts,
        partial(store.find, KEY),
        partial(store.record, new_message()),
    ]
    for call in calls:
        with pytest.raises(SchemaError, match=r"messages is missing; run `celery -A proj idempotent init`"):
            call()
    assert store.init()
    store.check()
    assert store.record(new_message()) == Inserted()
    store.close()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("call", [lambda store: store.find(KEY), lambda store: store.check()], ids=["find", "check"])
def test_an_embedded_table_is_made_on_first_use(store_url: str, call: Callable[[Store], object]) -> None:
    store = SQLStore(store_url)
    call(store)
    assert not store.init()
    store.close()


def test_an_in_memory_store_needs_no_set_up() -> None:
    store = SQLStore("sqlite://")
    pending(store)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: store.find(KEY), range(40)))
    assert all(row is not None for row in found)
    with store.engine.begin() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM queue_log")).scalar() == 1
    store.close()


@pytest.mark.parametrize("verb", ["check", "init", "counts"])
def test_an_old_table_is_reported_with_its_missing_columns(store_url: str, verb: str) -> None:
    engine = sa.create_engine(store_url)
    sa.Table(
        "queue_log", sa.MetaData(), sa.Column("message_id", sa.String(255)), sa.Column("status", sa.String(16))
    ).create(engine)
    store = SQLStore(store_url)

    with pytest.raises(
        SchemaError, match=r"lacks task_name, processed_status, .*error.*`celery -A proj idempotent init`"
    ):
        getattr(store, verb)()

    assert [column["name"] for column in sa.inspect(engine).get_columns("queue_log")] == ["message_id", "status"]
    store.close()
    engine.dispose()


def test_a_column_that_goes_missing_is_named(store: SQLStore) -> None:
    pending(store)
    with store.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE queue_log DROP COLUMN duplicates"))
    with pytest.raises(SchemaError, match="lacks duplicates"):
        store.count_duplicate(KEY)
    with pytest.raises(SchemaError, match="lacks duplicates"):
        store.find(KEY)


@on_servers
def test_a_missing_table_is_named_and_used_once_it_is_back(store: SQLStore) -> None:
    with store.engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE queue_log"))
    with pytest.raises(SchemaError, match="queue_log is missing"):
        store.record(new_message())
    store.init()
    assert store.record(new_message()) == Inserted()


def test_a_table_of_ones_own_metadata_serves(store_url: str) -> None:
    metadata = sa.MetaData()
    table = queue_log_table(metadata)
    table.append_column(sa.Column("tenant", sa.String(20), nullable=True))
    assert queue_log_table(metadata) is table
    sa.Table("orders", metadata, sa.Column("id", sa.Integer, primary_key=True))
    engine = sa.create_engine(store_url)
    metadata.create_all(engine)
    store = SQLStore(store_url)

    assert not store.init()
    store.check()
    pending(store)
    with engine.connect() as connection:
        assert connection.execute(sa.select(table.c.message_id, table.c.tenant)).one() == (KEY.message_id, None)
    store.close()
    engine.dispose()


@on_servers
def test_a_table_may_be_in_another_schema(store_url: str, store: SQLStore) -> None:
    namespace = f"{sa.make_url(store_url).database}_ns" if store.engine.dialect.name != "postgresql" else "queue_log_ns"
    with store.engine.begin() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {namespace}"))
    try:
        named = SQLStore(store_url, table=f"{namespace}.messages")
        with pytest.raises(SchemaError, match=rf"{namespace}\.messages is missing"):
            named.check()
        assert named.init()
        pending(named)
        assert store.find(KEY) is None
        assert sa.inspect(store.engine).has_table("messages", schema=namespace)
        named.close()
    finally:
        with store.engine.begin() as connection:
            cascade = "CASCADE" if connection.dialect.name == "postgresql" else ""
            connection.execute(sa.text(f"DROP SCHEMA {namespace} {cascade}"))


def test_init_makes_an_index_that_is_missing(store: SQLStore) -> None:
    inspector = sa.inspect(store.engine)
    index = inspector.get_indexes("queue_log")[0]["name"]
    on = "" if store.engine.dialect.name in {"postgresql", "sqlite"} else " ON queue_log"
    with store.engine.begin() as connection:
        connection.execute(sa.text(f"DROP INDEX {index}{on}"))
    assert store.init()
    assert not store.init()
    assert index in {found["name"] for found in sa.inspect(store.engine).get_indexes("queue_log")}


# -- at the same time -----------------------------------------------------------------------------------------------------------


def test_many_may_init_at_once(store_url: str) -> None:
    stores = [SQLStore(store_url) for _ in range(6)]
    start = Barrier(len(stores))

    def init(store: SQLStore) -> bool:
        start.wait(30)
        return store.init()

    with ThreadPoolExecutor(len(stores)) as threads:
        made = list(threads.map(init, stores))

    assert any(made)
    for store in stores:
        store.check()
        store.close()
    engine = sa.create_engine(store_url)
    assert {tuple(index["column_names"]) for index in sa.inspect(engine).get_indexes("queue_log")} == {
        tuple(index.columns.keys()) for index in queue_log_table(sa.MetaData()).indexes
    }
    engine.dispose()


def use_first(url: str, start: Any, answers: Any) -> None:
    """Use a new file, as one process of many."""
    store = SQLStore(url)
    start.wait(60)
    try:
        answers.put(type(store.record(new_message())).__name__)
    except BaseException as error:  # noqa: BLE001 - the test has to see any error
        answers.put(repr(error))
    store.close()


def test_many_processes_may_be_the_first_to_use_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(5):
        url = f"sqlite:///{tmp_path / f'{number}.db'}"
        start, answers = context.Barrier(6), context.SimpleQueue()
        processes = [context.Process(target=use_first, args=(url, start, answers)) for _ in range(6)]
        for process in processes:
            process.start()
        heard = sorted(answers.get() for _ in processes)
        for process in processes:
            process.join()
        assert heard == ["Duplicate"] * 5 + ["Inserted"]


# -- what the table is like -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_mariadb", "collation"), [(True, "utf8mb4_nopad_bin"), (False, "utf8mb4_0900_bin")])
def test_ids_are_compared_byte_for_byte_on_mysql_and_on_mariadb(is_mariadb: bool, collation: str) -> None:
    dialect = mysql.dialect()
    dialect.is_mariadb = is_mariadb
    ddl = str(CreateTable(queue_log_table(sa.MetaData())).compile(dialect=dialect))
    for column in ("message_id", "task_name", "task_id", "worker"):
        assert f"{column} VARCHAR(255) CHARACTER SET utf8mb4 COLLATE {collation}" in ddl
    assert "ENGINE=InnoDB" in ddl
    assert "DATETIME(6)" in ddl
    assert "LONGBLOB" in ddl


def test_the_columns_are_of_their_types(store: SQLStore) -> None:
    types = {
        column["name"]: column["type"].compile(store.engine.dialect)
        for column in sa.inspect(store.engine).get_columns("queue_log")
    }
    expected = {
        "postgresql": ("VARCHAR(255)", "TIMESTAMP WITH TIME ZONE", "BYTEA", "BIGINT"),
        "mysql": ("VARCHAR(255)", "DATETIME(6)", "LONGBLOB", "BIGINT(20)"),
        "sqlite": ("VARCHAR(255)", "DATETIME", "BLOB", "BIGINT"),
    }[store.engine.dialect.name]
    assert (types["message_id"].split(" ")[0], types["lease_expires_at"], types["message"], types["token"]) == expected
    assert types["created_timestamp"] == types["expires_at"] == expected[1]


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_indexes_are_partial_where_they_can_be(store: SQLStore) -> None:
    with store.engine.connect() as connection:
        indexes = connection.execute(
            sa.text(
                "SELECT indexdef FROM pg_indexes WHERE schemaname = current_schema() AND indexname NOT LIKE '%pkey'"
            )
        ).scalars()
        assert all(" WHERE " in definition for definition in indexes)
