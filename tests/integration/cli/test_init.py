"""``init`` makes a missing table, asks before it changes an existing one, and prints the SQL for doing it by hand."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from celery_idempotent import SQLStore
from tests.integration.cli.test_asking import at_a_terminal
from tests.support.apps.newer import CHANGES, newer
from tests.support.cli import PROJECT, run_celery_once
from tests.support.worker import ROOT

WRITTEN = Path(__file__).parents[1] / "stores" / "sql" / "versions"

Init = Callable[..., subprocess.CompletedProcess[str]]

#: What makes the commands those of the next version.
NEXT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from celery_idempotent.stores.sql import table
from tests.support.apps.newer import VERSIONS
table.VERSIONS = VERSIONS
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "proj.py").write_text(PROJECT + NEXT)
    return tmp_path


def run_sql(url: str, script: str) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in script.split(";\n"):
            if statement.strip():
                connection.execute(sa.text(statement))
    engine.dispose()


@pytest.fixture
def url(project: Path) -> str:
    """Return a file with a table of the first version."""
    url = f"sqlite:///{project / 'log.db'}"
    run_sql(url, (WRITTEN / "1.sqlite.sql").read_text())
    return url


def outstanding(url: str) -> list[str]:
    with newer(), closing(SQLStore(url)) as store:
        return [change.what for change in store.outstanding()]


@pytest.fixture
def init(project: Path) -> Init:
    """Run ``init`` without a terminal."""

    def init(*arguments: str, store: str = "sqlite:///log.db") -> subprocess.CompletedProcess[str]:
        return run_celery_once(project, "idempotent", "init", *arguments, app="proj", store=store)

    return init


def test_an_older_table_is_changed_by_those_who_say_so(init: Init, url: str) -> None:
    assert outstanding(url) == CHANGES

    refused = init()
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "to do: add the column tenant to queue_log\n" in refused.stderr
    assert "check with --dry-run, then pass --yes" in refused.stderr
    assert outstanding(url) == CHANGES

    done = init("--yes", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"table": "queue_log", "created": False, "changes": CHANGES}
    assert "create the index queue_log_tenant ...\n" in done.stderr
    assert outstanding(url) == []
    assert init().stdout == "queue_log is up to date\n"


def test_at_a_terminal_it_asks_and_says_what_it_does(project: Path, url: str) -> None:
    status, seen = at_a_terminal(project, "init", answer="n\n")
    assert status == 1
    assert "Change the table queue_log? [y/N]" in seen
    assert outstanding(url) == CHANGES

    status, seen = at_a_terminal(project, "init", answer="y\n")
    assert status == 0
    assert "create the index queue_log_tenant ..." in seen
    assert "queue_log upgraded" in seen
    assert outstanding(url) == []


def test_at_a_terminal_a_missing_table_is_made_without_a_question(project: Path) -> None:
    status, seen = at_a_terminal(project, "init", answer="")
    assert (status, seen.strip()) == (0, "queue_log created")


def test_a_dry_run_prints_what_would_be_run(init: Init, project: Path, url: str) -> None:
    said = init("--dry-run")
    assert (said.returncode, said.stderr) == (0, "")
    assert [line.removeprefix("-- ") for line in said.stdout.splitlines() if line.startswith("--")] == CHANGES
    assert outstanding(url) == CHANGES

    run_sql(url, "\n".join(line for line in said.stdout.splitlines() if not line.startswith("--")))
    assert outstanding(url) == []
    assert init("--dry-run").stdout == "-- queue_log has this version already\n"

    said = init("--dry-run", store="sqlite:///none.db")
    assert "CREATE TABLE IF NOT EXISTS queue_log (\n    message_id VARCHAR(255) NOT NULL,\n" in said.stdout
    assert not (project / "none.db").exists()


@pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)
def test_the_printed_sql_makes_the_table(init: Init, store_url: str) -> None:
    """The app's own store is not asked: the statements may be for a database that this host does not reach."""
    kind = "postgresql" if store_url.startswith("postgresql") else "mariadb"

    def printed(*arguments: str) -> str:
        said = init("--sql", kind, *arguments, store="postgresql://nobody@127.0.0.1:1/none")
        assert (said.returncode, said.stderr) == (0, "")
        return "\n".join(line for line in said.stdout.splitlines() if not line.startswith("--"))

    run_sql(store_url, (WRITTEN / f"1.{kind}.sql").read_text())
    assert outstanding(store_url) == CHANGES
    run_sql(store_url, printed("--since", "1"))
    assert outstanding(store_url) == []
    run_sql(store_url, "DROP TABLE queue_log")
    run_sql(store_url, printed())
    assert outstanding(store_url) == []


def test_the_sql_printed_for_mysql_is_mysqls(init: Init) -> None:
    assert "COLLATE utf8mb4_0900_bin" in init("--sql", "mysql").stdout
    since = init("--sql", "mysql", "--since", "1").stdout
    assert "CREATE INDEX queue_log_tenant ON queue_log (tenant) ALGORITHM=INPLACE LOCK=NONE;" in since


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--since", "1"), "--since requires --sql"),
        (
            ("--sql", "postgresql", "--since", "99"),
            "there is no version 99 of the table: this version of celery-idempotent has 2",
        ),
        (("--sql", "oracle"), "'oracle' is not one of"),
    ],
)
def test_impossible_options_are_refused(init: Init, arguments: tuple[str, ...], said: str) -> None:
    refused = init(*arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert said in refused.stderr
