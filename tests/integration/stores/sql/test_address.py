"""URLs: short forms, mistakes, missing drivers; and no password in any text."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType

import pytest
import sqlalchemy as sa
from celery import Celery
from sqlalchemy.ext.asyncio import create_async_engine

from celery_idempotent import QueueLog
from celery_idempotent.core.records import Duplicate, MessageKey
from celery_idempotent.errors import ConfigurationError, StoreUnavailableError
from celery_idempotent.stores import open_store
from celery_idempotent.stores.sql import SQLStore
from celery_idempotent.stores.sql.address import parse
from celery_idempotent.testing.examples import KEY, new_message, processing
from tests.support.servers import PrivatePgBouncer, PrivatePostgreSQL


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
        ("postgresql://u:p@h1:5432,h2/d", "postgresql+psycopg://u:p@/d?host=h1%3A5432&host=h2"),
        ("postgres://h1,h2/d?sslmode=require", "postgresql+psycopg:///d?host=h1&host=h2&sslmode=require"),
        ("postgresql://u:a,b@h/d", "postgresql+psycopg://u:a%2Cb@h/d"),
        ("mysql://u@h/d?ssl=true", "mysql+pymysql://u@h/d?ssl_verify_cert=false"),
        ("mysql://u@h/d?ssl=1&ssl_ca=/ca.pem", "mysql+pymysql://u@h/d?ssl_ca=%2Fca.pem"),
        ("mysql://u@h/d?ssl=false", "mysql+pymysql://u@h/d?ssl_disabled=true"),
        ("postgresql+asyncpg://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgres+asyncpg://h1,h2/d?ssl=require", "postgresql+psycopg:///d?host=h1&host=h2&sslmode=require"),
        (
            "postgresql+asyncpg://u@h/d?timeout=3&prepared_statement_cache_size=0&application_name=x",
            "postgresql+psycopg://u@h/d?application_name=x&connect_timeout=3",
        ),
        ("postgresql+psycopg_async://u@h/d", "postgresql+psycopg://u@h/d"),
        ("mysql+asyncmy://u@h/d?charset=utf8mb4", "mysql+pymysql://u@h/d?charset=utf8mb4"),
        ("mysql+aiomysql://u@h/d?ssl=true", "mysql+pymysql://u@h/d?ssl_verify_cert=false"),
        ("mariadb+asyncmy://u@h/d", "mariadb+pymysql://u@h/d"),
        ("sqlite+aiosqlite:///queue_log.db?timeout=3", "sqlite:///queue_log.db?timeout=3"),
    ],
)
def test_short_forms_are_written_out(short: str, long: str) -> None:
    assert parse(short).render_as_string(hide_password=False) == long


def test_an_asynchronous_driver_is_replaced_by_the_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the asynchronous driver is not installed: a worker needs only the other."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    assert parse("postgresql+asyncpg://u@h/d").drivername == "postgresql+psycopg"
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.setitem(sys.modules, "pymysql", None)
    monkeypatch.setitem(sys.modules, "psycopg2", ModuleType("psycopg2"))
    assert parse("postgresql+asyncpg://u@h/d").drivername == "postgresql+psycopg2"
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    monkeypatch.setitem(sys.modules, "MySQLdb", None)
    with pytest.raises(ConfigurationError, match=r"celery-idempotent\[postgresql\]' \(or use psycopg or psycopg2\)"):
        parse("postgresql+asyncpg://u:s3cret@h/d")
    with pytest.raises(ConfigurationError, match=r"celery-idempotent\[mysql\]' \(or use pymysql or mysqlclient\)"):
        parse("mysql+asyncmy://u:s3cret@h/d")


def test_an_asynchronous_engine_is_refused_with_the_way_to_do_it() -> None:
    engine = create_async_engine("sqlite+aiosqlite:///queue_log.db")
    for given in (engine, engine.sync_engine):
        with pytest.raises(ConfigurationError, match=r"SQLStore\(engine.url\)"):
            SQLStore(given)  # type: ignore[arg-type]
    assert "sqlite:///queue_log.db" in repr(SQLStore(engine.url))


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("", "cannot be read; write it as postgresql://"),
        ("queue_log.db", "cannot be read; write it as postgresql://"),
        ("postgresql://u:s3cret@h:port/d", "cannot be read; write it as postgresql://"),
        ("oracle://u:s3cret@h/d", "begins with oracle://, which is not known"),
        ("mongodb://u:s3cret@h/d", "begins with mongodb://, which is not known"),
        ("postgresql+nosuch://u:s3cret@h/d", "whose driver is not known"),
        ("postgresql+pg8000://u:s3cret@h/d", "cannot use the driver pg8000.*use postgresql://"),
        ("mysql://u:s3cret@h1:1,h2:2/d", "several hosts.*name one"),
        ("mysql://u:s3cret@h/d?ssl=s3cret", "ssl in the store's URL is true or false.*ssl_ca="),
        ("postgresql://u:s3cret@h/d?pool_size=5&max_overflow=9", "max_overflow, pool_size.*leave it out"),
    ],
)
def test_a_bad_url_is_reported_without_its_password(url: str, text: str) -> None:
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
def test_a_missing_driver_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, url: str, module: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError) as caught:
        open_store(url)
    assert command in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_url_object_is_taken_as_a_store(store_url: str) -> None:
    app = Celery("urls", broker="memory://", set_as_current=False)
    app.conf.idempotent_store = sa.make_url(store_url)
    assert QueueLog(app).init()
    app.queue_log.close()
    store = open_store(sa.make_url(store_url))
    store.check()
    store.close()


@pytest.mark.parametrize("store_url", ["mariadb"], indirect=True)
def test_tls_is_asked_for_by_a_word(store_url: str) -> None:
    engine = sa.create_engine(store_url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        offered = connection.execute(sa.text("SELECT @@have_ssl")).scalar() == "YES"
    for asked in (True, False):
        store = SQLStore(sa.make_url(store_url).update_query_dict({"ssl": str(asked).lower()}))
        with nullcontext() if offered or not asked else pytest.raises(StoreUnavailableError, match="SSL"):
            store.init()
        store.close()


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_an_option_that_the_driver_does_not_know_is_named(store_url: str) -> None:
    store = SQLStore(sa.make_url(store_url).update_query_dict({"conect_timeout": "3"}))
    with pytest.raises(ConfigurationError, match='wrong option: invalid connection option "conect_timeout"'):
        store.check()


def test_hosts_are_tried_in_turn(postgresql_url: str) -> None:
    url = sa.make_url(postgresql_url)
    store = SQLStore(f"postgresql://{url.username}@127.0.0.1:1,{url.host}:{url.port}/{url.database}")
    assert store.configuration()
    store.close()


@pytest.fixture
def odd(private_postgresql: PrivatePostgreSQL) -> Callable[[str, str], str]:
    """Make a database as one is found at times: with a statement that makes it, and one that sets it up."""

    def make(create: str, alter: str = "") -> str:
        engine = sa.create_engine(private_postgresql.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            for statement in filter(None, (create, alter)):
                connection.execute(sa.text(statement))
        return sa.make_url(private_postgresql.url).set(database="odd").render_as_string(hide_password=False)

    return make


def as_a_task_uses_it(store: SQLStore) -> None:
    store.init()
    held = processing(store, key=MessageKey("größer", "t"))
    assert store.complete(held, result=b"1")
    row = store.find(held.key)
    assert row is not None
    assert row.processed_timestamp is not None
    with store.engine.begin() as body:
        found = store.within(body).record(new_message(held.key))
        assert isinstance(found, Duplicate)
        assert found.row.key == held.key


@pytest.mark.parametrize(
    ("create", "alter"),
    [
        ("CREATE DATABASE odd ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0", ""),
        ("CREATE DATABASE odd", "ALTER DATABASE odd SET DateStyle = 'German'"),
        ("CREATE DATABASE odd", "ALTER DATABASE odd SET DateStyle = 'SQL, DMY'"),
        ("CREATE DATABASE odd", "ALTER DATABASE odd SET default_transaction_isolation = 'serializable'"),
    ],
    ids=["SQL_ASCII", "German dates", "SQL dates", "serializable"],
)
def test_a_database_that_is_set_oddly_serves(odd: Callable[[str, str], str], create: str, alter: str) -> None:
    store = SQLStore(odd(create, alter))
    as_a_task_uses_it(store)
    store.close()


def test_a_date_style_that_a_pooler_hides_is_refused(odd: Callable[[str, str], str]) -> None:
    url = odd("CREATE DATABASE odd", "ALTER DATABASE odd SET DateStyle = 'German'")
    with PrivatePgBouncer(url) as pooler:
        store = SQLStore(pooler.url)
        with pytest.raises(ConfigurationError, match="ALTER ROLE postgres SET DateStyle = ISO"):
            store.check()
        store.close()


@contextmanager
def too_many_open_files() -> Iterator[None]:
    """Let this process open no other."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
    with ExitStack() as files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, limits[1]))
        try:
            with suppress(OSError):
                while True:
                    files.enter_context(Path("/dev/null").open())
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_many_open_files_are_an_outage(store_url: str) -> None:
    store = SQLStore(store_url)
    store.init()
    store.close()
    with too_many_open_files(), pytest.raises(StoreUnavailableError) as caught:
        store.find(KEY)
    assert caught.value.unsent
    assert store.find(KEY) is None
    store.close()


@pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)
def test_too_many_open_files_on_a_connection_that_is_open(store_url: str) -> None:
    store = SQLStore(store_url)
    store.init()
    with too_many_open_files(), pytest.raises(StoreUnavailableError) as caught:
        store.find(KEY)
    assert caught.value.unsent
    assert store.find(KEY) is None
    store.close()


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
