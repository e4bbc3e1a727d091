"""An app's connections end with it: by ``app.close()``, or once it is garbage. Test suites make an app for each test."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from uuid import uuid4

import pytest
import sqlalchemy as sa
from celery import Celery
from celery.contrib.testing.app import TestApp as make_test_app  # noqa: N813 - no test of pytest's
from celery.contrib.testing.app import setup_default_app
from celery.contrib.testing.worker import start_worker

from celery_idempotent import IdempotentTask, QueueLog, SQLStore
from tests.support.waiting import wait_until

#: Apps, one after the other.
APPS = 3


@pytest.fixture
def count_connections(store_url: str) -> Callable[[], int]:
    """How many connections there are on the store that :func:`store_of` gives; on SQLite, which is none, none."""
    server = sa.create_engine(store_url, poolclass=sa.NullPool)
    counts = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE application_name = :name",
        "mariadb": "SELECT count(*) - 1 FROM information_schema.processlist WHERE db = database() AND :name != ''",
    }

    def count_connections() -> int:
        if server.dialect.name not in counts:
            return 0
        with server.connect() as connection:
            return int(connection.scalar(sa.text(counts[server.dialect.name]), {"name": _name_in(store_url)}) or 0)

    return count_connections


def _name_in(store_url: str) -> str:
    return f"ends-{abs(hash(store_url))}"


def store_of(store_url: str) -> str:
    if not store_url.startswith("postgresql"):
        return store_url
    url = sa.make_url(store_url).update_query_dict({"application_name": _name_in(store_url)})
    return url.render_as_string(hide_password=False)


@pytest.fixture
def threads() -> Callable[[], list[str]]:
    """Names of our threads, but for those that were there before the test."""
    before = set(threading.enumerate())
    return lambda: [
        thread.name for thread in threading.enumerate() if "idempotent" in thread.name and thread not in before
    ]


def use(app: Celery, store_url: str, *, work: bool) -> None:
    """Send a message and run it, here or in a worker in a thread; an atomic one too."""
    unique = uuid4().hex[:8]
    app.conf.update(
        idempotent_store=store_of(store_url),
        task_always_eager=not work,
        task_default_queue=f"ends-{unique}",
        broker_transport_options={"polling_interval": 0.05},
    )
    QueueLog.of(app).init()

    def double(value: int) -> int:
        return 2 * value

    tasks = [
        app.task(base=IdempotentTask, name=f"double-{atomic}-{unique}", shared=False, atomic=atomic)(double)
        for atomic in (False, True)
    ]
    if not work:
        assert [task.delay(2).get() for task in tasks] == [4, 4]
        return
    root = logging.getLogger()
    level = root.level
    try:
        with start_worker(app, perform_ping_check=False, shutdown_timeout=60.0):
            assert [task.delay(2).get(timeout=30, interval=0.05) for task in tasks] == [4, 4]
    finally:
        root.setLevel(level)  # a worker sets its own


def is_gone(
    ends: list[weakref.ref[Celery]], threads: Callable[[], list[str]], count_connections: Callable[[], int]
) -> bool:
    gc.collect()
    return not any(end() for end in ends) and not threads() and count_connections() == 0


@pytest.mark.parametrize(
    ("close", "work"),
    # A worker makes its app the current one, and only Celery's fixture takes that back.
    [(False, False), (True, False), (True, True)],
    ids=["dropped", "closed", "closed behind a worker"],
)
def test_an_unreferenced_app_closes_its_connections(
    store_url: str, threads: Callable[[], list[str]], count_connections: Callable[[], int], close: bool, work: bool
) -> None:
    def one() -> weakref.ref[Celery]:
        app = make_test_app(set_as_current=False)
        if close:  # as Celery's fixture `celery_app`
            with setup_default_app(app):
                use(app, store_url, work=work)
        else:
            use(app, store_url, work=work)
        return weakref.ref(app)

    ends = [one() for _ in range(APPS)]
    wait_until(
        lambda: is_gone(ends, threads, count_connections),
        # Less than a thread without work would stay, were it not told of the end.
        timeout=15.0,
        interval=0.2,
        describe=lambda: f"{[end() for end in ends]}, {threads()}, {count_connections()} connections",
    )


def test_an_app_that_is_closed_has_neither_threads_nor_connections(
    store_url: str, threads: Callable[[], list[str]], count_connections: Callable[[], int]
) -> None:
    apps = []
    for _ in range(APPS):
        app = make_test_app(set_as_current=False)
        use(app, store_url, work=False)
        app.close()
        apps.append(app)
    wait_until(lambda: not threads() and count_connections() == 0, timeout=15.0)

    use(apps[0], store_url, work=False)  # and it may be used again
    apps[0].close()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_store_that_was_given_is_its_givers_to_close(store_url: str) -> None:
    store = SQLStore(store_url)
    store.init()
    opened = store._database._opened
    app = make_test_app(set_as_current=False)
    QueueLog(app, store=store)
    app.close()
    assert opened
    del app
    gc.collect()
    assert opened
    store.close()


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_a_database_can_be_dropped_after_the_queue_log_is_closed(store_url: str) -> None:
    name = f"dropped_{uuid4().hex[:12]}"
    server = sa.create_engine(store_url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    app = Celery("dropped", broker="memory://", backend="cache+memory://", set_as_current=False)
    url = sa.make_url(store_url).difference_update_query(("options",)).set(database=name)
    use(app, url.render_as_string(hide_password=False), work=False)
    try:
        app.queue_log.close()
    finally:
        with server.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name}")
        app.close()
