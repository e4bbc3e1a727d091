"""Versions of the table: each follows from the one before it, and is what it was when it was new."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.dialects.postgresql import psycopg

from celery_idempotent.stores.sql import table as tables
from celery_idempotent.stores.sql.migrations import newest, present_in, statements_back, statements_to
from celery_idempotent.stores.sql.table import queue_log_table, table_of_version
from tests.support.apps.newer import VERSIONS, newer

#: What each version was made of, by each database's own words. A file that is here is never changed.
WRITTEN = Path(__file__).resolve().parents[3] / "integration" / "stores" / "sql" / "versions"

#: The versions that there are, and one that is to come.
NUMBERS = list(range(1, len(VERSIONS) + 1))


@pytest.fixture
def next_version() -> Iterator[None]:
    with newer():
        yield


def dialect(name: str) -> sa.Dialect:
    found: Any = {"postgresql": psycopg, "mariadb": mysql, "sqlite": sqlite}[name].dialect()
    if name == "mariadb":
        found.is_mariadb = True
    return found  # type: ignore[no-any-return]


def in_order(statements: str) -> str:
    """With a table's options sorted: SQLAlchemy 2.0 gives them in another order each time."""
    return re.sub(
        r"(?<=^\))\w+=.*(?=;$)", lambda found: " ".join(sorted(found[0].split())), statements, flags=re.MULTILINE
    )


def shape(table: sa.Table) -> tuple[list[str], dict[Any, list[str]]]:
    return list(table.columns.keys()), {index.name: list(index.columns.keys()) for index in table.indexes}


@pytest.mark.parametrize("number", range(1, len(tables.VERSIONS) + 1))
@pytest.mark.parametrize("name", ["postgresql", "mariadb", "sqlite"])
def test_a_version_is_what_it_was(number: int, name: str) -> None:
    """A change to the table is a new version, with a file of its own here; never a change to an old one."""
    made = ";\n\n".join(each.text(dialect(name)) for each in statements_to(number, "queue_log", None, None)) + ";\n"
    written = (WRITTEN / f"{number}.{name}.sql").read_text()
    assert in_order(made.replace("IF NOT EXISTS ", "")) == in_order(written)


def test_the_newest_version_is_the_table() -> None:
    newest_table = table_of_version(newest(), sa.MetaData(), "queue_log", None)
    assert shape(newest_table) == shape(queue_log_table(sa.MetaData()))


@pytest.mark.usefixtures("next_version")
@pytest.mark.parametrize("number", NUMBERS[1:])
def test_code_of_the_version_before_can_go_on(number: int) -> None:
    """It inserts without the new columns, and finds all of its own."""
    before, after = (table_of_version(each, sa.MetaData(), "queue_log", None) for each in (number - 1, number))
    assert {*before.columns.keys()} <= {*after.columns.keys()}
    for column in VERSIONS[number - 1].columns():
        assert column.nullable or column.server_default is not None, column.name
    for name in before.columns.keys():  # noqa: SIM118 - a column collection is none of names
        assert repr(before.c[name].type) == repr(after.c[name].type)


def test_an_index_has_its_name_for_ever() -> None:
    names = [index.name for version in VERSIONS for index in version.indexes]
    assert len(set(names)) == len(names)


@pytest.mark.usefixtures("next_version")
@pytest.mark.parametrize("since", NUMBERS)
@pytest.mark.parametrize("to", NUMBERS)
def test_from_each_to_each(since: int, to: int) -> None:
    """The offline SQL has every change that a database lacks, and the way back."""
    engine = sa.create_engine("sqlite://")
    with engine.begin() as connection:
        for statement in statements_to(since, "queue_log", None, None):
            connection.execute(statement.ddl)
        statements = (
            statements_to(to, "queue_log", None, present_in(since, "queue_log"))
            if to >= since
            else statements_back(since, to, "queue_log", None)
        )
        for statement in statements:
            assert statement.alters
            connection.execute(statement.ddl)
        found = sa.inspect(connection)
        columns = [column["name"] for column in found.get_columns("queue_log")]
        indexes = {index["name"]: index["column_names"] for index in found.get_indexes("queue_log")}
        assert (columns, indexes) == shape(table_of_version(to, sa.MetaData(), "queue_log", None))
        for statement in statements_back(to, 0, "queue_log", None):
            connection.execute(statement.ddl)
        assert not sa.inspect(connection).has_table("queue_log")
    engine.dispose()
