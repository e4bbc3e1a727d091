"""URLs: short forms, mistakes, missing drivers; and no password in any text."""

from __future__ import annotations

import subprocess
import sys

import pytest
import sqlalchemy as sa

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.stores import open_store
from celery_idempotent.stores.sql import SQLStore
from celery_idempotent.stores.sql.address import parse


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("postgres://u@h/d", "postgresql+psycopg://u@h/d"),
        ("postgresql://u@h/d", "postgresql+psycopg://u@h/d"),
        ("postgres+psycopg://u@h/d", "postgresql+psycopg://u@h/d"),
        ("postgresql+psycopg://u@h/d", "postgresql+psycopg://u@h/d"),
        ("mysql://u@h/d", "mysql+pymysql://u@h/d"),
        ("mysql+pymysql://u@h/d", "mysql+pymysql://u@h/d"),
        ("mariadb://u@h/d", "mariadb+pymysql://u@h/d"),
        ("sqlite:///queue_log.db", "sqlite:///queue_log.db"),
        ("sqlite://", "sqlite://"),
        ("postgresql://u:p%40ss@h/d?application_name=shop", "postgresql+psycopg://u:p%40ss@h/d?application_name=shop"),
    ],
)
def test_short_forms_are_written_out(short: str, long: str) -> None:
    assert parse(short).render_as_string(hide_password=False) == long


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("", "cannot be read; write it as postgresql://"),
        ("queue_log.db", "cannot be read; write it as postgresql://"),
        ("postgresql://u:s3cret@h:port/d", "cannot be read; write it as postgresql://"),
        ("oracle://u:s3cret@h/d", "begins with oracle://, which is not known"),
        ("mongodb://u:s3cret@h/d", "begins with mongodb://, which is not known"),
        ("postgresql+nosuch://u:s3cret@h/d", "whose driver is not known"),
        ("sqlite+aiosqlite:///s3cret.db", "is not installed|asyncio driver"),
    ],
)
def test_a_bad_url_is_told_without_its_password(url: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text) as caught:
        open_store(url)
    told = str(caught.value)
    assert "s3cret" not in told
    assert caught.value.__suppress_context__ or "s3cret" not in str(caught.value.__context__)


@pytest.mark.parametrize("url", ["redis://:s3cret@h/0", "rediss://:s3cret@h/0", "sentinel://:s3cret@h/0"])
def test_redis_is_for_another_store(url: str) -> None:
    with pytest.raises(ConfigurationError, match="the queue log is a RedisStore") as caught:
        SQLStore(url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "module", "command"),
    [
        ("postgresql://u:s3cret@h/d", "psycopg", "pip install 'celery-idempotent[postgresql]'"),
        ("mysql://u:s3cret@h/d", "pymysql", "pip install 'celery-idempotent[mysql]'"),
        ("mariadb://u:s3cret@h/d", "pymysql", "pip install 'celery-idempotent[mysql]'"),
        ("postgresql+psycopg2://u:s3cret@h/d", "psycopg2", "pip install psycopg2"),
    ],
)
def test_a_missing_driver_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, url: str, module: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError) as caught:
        open_store(url)
    assert command in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_representation_hides_passwords() -> None:
    store = SQLStore("postgresql://shop:s3cret@db.example/shop?password=s3cret", table="ops.queue_log")
    assert repr(store) == "SQLStore('postgresql+psycopg://shop:***@db.example/shop', table='ops.queue_log')"


def test_an_engine_of_another_kind_of_database_is_refused() -> None:
    engine = sa.create_mock_engine("oracle://", lambda *_: None)
    fake = sa.Engine(None, engine.dialect, sa.make_url("oracle://u:s3cret@h/d"))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="cannot live in 'oracle': use PostgreSQL"):
        SQLStore(fake)


def test_opening_a_store_connects_to_nothing() -> None:
    open_store("postgresql://nobody@192.0.2.1:1/nowhere").close()


def test_importing_the_stores_imports_no_driver() -> None:
    script = (
        "import sys, celery_idempotent.stores.sql, celery_idempotent.stores as stores\n"
        "store = stores.open_store('sqlite://')\n"
        "print([name for name in ('psycopg', 'psycopg2', 'pymysql', 'MySQLdb', 'pytest') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
