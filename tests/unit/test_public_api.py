"""What the package offers, and what importing it costs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

import celery_idempotent
from tests.support.servers import missing

ROOT = Path(__file__).resolve().parents[2]

PUBLIC = {
    "AlreadyFailedError",
    "AlreadyProcessingError",
    "ConfigurationError",
    "CurrentMessage",
    "Done",
    "DuplicateMessageError",
    "EagerStoreWarning",
    "IdempotentError",
    "IdempotentTask",
    "LeaseLostError",
    "MessageMismatchError",
    "Outcome",
    "OutcomeKind",
    "QueueLog",
    "RedisStore",
    "RefusedError",
    "SQLStore",
    "SchemaError",
    "StoreError",
    "StoreUnavailableError",
    "by_arguments",
    "current_message",
    "outbox",
    "queue_log_table",
}


def test_all_is_the_public_api() -> None:
    assert set(celery_idempotent.__all__) == PUBLIC
    assert list(celery_idempotent.__all__) == sorted(celery_idempotent.__all__)
    for name in PUBLIC:
        assert getattr(celery_idempotent, name).__module__.startswith("celery_idempotent.")


def test_dir_and_star_have_all_of_it() -> None:
    assert set(celery_idempotent.__all__) <= set(dir(celery_idempotent))
    star: dict[str, object] = {}
    exec("from celery_idempotent import *", star)
    assert set(celery_idempotent.__all__) <= set(star)


def test_nothing_else_is_there() -> None:
    with pytest.raises(AttributeError, match="module 'celery_idempotent' has no attribute 'SQLStor'"):
        _ = celery_idempotent.SQLStor  # type: ignore[attr-defined]


def modules_after(statements: str) -> set[str]:
    script = f"import sys\n{statements}\nprint(*sys.modules, sep='\\n')"
    # Under `make coverage` a process keeps what it measures in SQLite.
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=unmeasured)
    return set(done.stdout.split())


HEAVY = ("sqlalchemy", "psycopg", "pymysql", "redis", "sqlite3", "gevent", "pytest", "celery.worker", "celery.bin")


def test_importing_it_imports_no_database_no_client_and_no_worker() -> None:
    assert modules_after("import celery_idempotent").isdisjoint(HEAVY)


def test_nor_does_declaring_a_task() -> None:
    loaded = modules_after(
        "from celery import Celery\n"
        "from celery_idempotent import IdempotentTask, QueueLog, by_arguments\n"
        "app = Celery('a', broker='memory://', idempotent_store='postgresql://there/db')\n"
        "@app.task(base=IdempotentTask, message_id=by_arguments())\n"
        "def task(a): ...\n"
        "assert task.idempotency.lease and QueueLog.of(app).settings.store"
    )
    # Celery's task registry asks for its own worker's request class; that is Celery's affair.
    assert loaded.isdisjoint(name for name in HEAVY if not name.startswith("celery."))


def test_the_urls_database_alone_is_loaded() -> None:
    loaded = modules_after("from celery_idempotent import SQLStore\nSQLStore('sqlite://').check()")
    assert loaded.isdisjoint({"psycopg", "pymysql", "redis"})


def test_in_redis_no_database_is_loaded() -> None:
    loaded = modules_after("from celery_idempotent import RedisStore\nRedisStore('redis://')")
    assert loaded.isdisjoint({"sqlalchemy", "psycopg", "pymysql"})
    assert "redis" in loaded


def test_it_is_typed() -> None:
    assert files(celery_idempotent).joinpath("py.typed").is_file()


def test_the_wheel_holds_the_package_the_mark_of_typing_and_the_command(tmp_path: Path) -> None:
    if find_spec("hatchling") is None:
        missing("hatchling", "it builds the wheel, and is in the group `dev`")
    # From a copy of what is built: what a checkout has besides is not for the wheel.
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        entry_points_text, metadata_text = archive.read(entry).decode(), archive.read(metadata).decode()

    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"celery_idempotent"}
    assert {"celery_idempotent/py.typed", "celery_idempotent/contrib/dashboard.json"} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "celery_idempotent").rglob("*.py")}
    assert modules <= names
    assert "[celery.commands]\nidempotent = celery_idempotent.cli:idempotent" in entry_points_text
    assert "[pytest11]\ncelery_idempotent = celery_idempotent.pytest_plugin" in entry_points_text
    assert f"Version: {celery_idempotent.__version__}\n" in metadata_text
    assert "Requires-Dist: psycopg[binary]" in metadata_text
    assert all("extra ==" in line for line in metadata_text.splitlines() if "psycopg" in line or "pymysql" in line)


def test_celery_finds_the_command() -> None:
    (found,) = entry_points(group="celery.commands", name="idempotent")
    assert found.load().name == "idempotent"
