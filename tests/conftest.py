"""The fixtures that all layers share.

Servers: ``postgresql_url``, ``mariadb_url``, ``redis_url``, ``rabbitmq_url`` (shared; a test takes care to use names of its own),
``private_postgresql``, ``private_pgbouncer`` (before it), ``private_redis``, ``private_rabbitmq`` (the test's own, to stop, kill and pause).

Places of a test's own: ``store_url`` (sqlite, postgresql, mariadb) and ``broker`` (redis, rabbitmq-classic, rabbitmq-quorum,
filesystem). A test that asks for one runs once per kind; to run on some only::

    @pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
    @pytest.mark.parametrize("broker", ["redis", "rabbitmq-quorum"], indirect=True)

Apps and workers: ``ledger``, ``spec``, ``open_app``, ``start_worker``.

A server that is not there skips its tests, and fails them under ``CI=true``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from celery import Celery
from celery.backends.redis import ResultConsumer

from tests.support.apps import AppSpec, OpenApp, close_app
from tests.support.brokers import BROKERS, Broker, filesystem_broker, rabbitmq_broker, redis_broker
from tests.support.ledger import Ledger
from tests.support.servers import (
    KINDS,
    PrivatePgBouncer,
    PrivatePostgreSQL,
    PrivateRabbitMQ,
    PrivateRedis,
    PrivateServer,
    skip_if_not_installed,
)
from tests.support.stores import STORES, mariadb_store, postgresql_store, sqlite_store
from tests.support.versions import CELERY
from tests.support.worker import StartWorker, WorkerProcess

LOGS = pytest.StashKey[dict[str, Callable[[], str]]]()
Server = TypeVar("Server", bound=PrivateServer)

#: In this process and its workers, a run raises on a forbidden change of state, instead of logging it.
os.environ["CELERY_IDEMPOTENT_STRICT"] = "1"

if CELERY < (5, 7):
    # Up to Celery 5.6, a result that is collected connects again to unsubscribe: 20 seconds in any later test once its server is gone.
    def _forget(consumer: Any, task_id: str) -> None:
        consumer.subscribed_to.discard(consumer._get_key_for_task(task_id))

    ResultConsumer.cancel_for = _forget


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Fail a test that leaves logging changed, because later tests would miss log lines."""
    before = _logging()
    yield
    after = _logging()
    logger = logging.getLogger("celery_idempotent")
    logger.disabled, logger.propagate, level, root_level, disabled_level = before
    logger.setLevel(level)
    logging.getLogger().setLevel(root_level)
    logging.disable(disabled_level)
    assert after == before, f"logging was left {after}, not {before}"


def _logging() -> tuple[bool, bool, int, int, int]:
    logger, root = logging.getLogger("celery_idempotent"), logging.getLogger()
    return logger.disabled, logger.propagate, logger.level, root.level, root.manager.disable


# -- servers ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgresql_url() -> str:
    return KINDS["postgresql"].require()


@pytest.fixture(scope="session")
def mariadb_url() -> str:
    return KINDS["mariadb"].require()


@pytest.fixture(scope="session")
def redis_url() -> str:
    return KINDS["redis"].require()


@pytest.fixture(scope="session")
def rabbitmq_url() -> str:
    return KINDS["rabbitmq"].require()


def _private(request: pytest.FixtureRequest, make: Callable[[], Server]) -> Iterator[Server]:
    with skip_if_not_installed(), make() as server:
        attach_log(request, f"{server.name} at {server.port}", server.log_tail)
        yield server


@pytest.fixture
def private_postgresql(request: pytest.FixtureRequest) -> Iterator[PrivatePostgreSQL]:
    """Yield a PostgreSQL of the test's own, with an empty database; a second or so."""
    yield from _private(request, PrivatePostgreSQL)


@pytest.fixture
def private_pgbouncer(
    request: pytest.FixtureRequest, private_postgresql: PrivatePostgreSQL
) -> Iterator[PrivatePgBouncer]:
    """Yield a PgBouncer in transaction pooling before ``private_postgresql``, with four connections to it; some milliseconds."""
    yield from _private(request, lambda: PrivatePgBouncer(private_postgresql.url))


@pytest.fixture
def private_redis(request: pytest.FixtureRequest) -> Iterator[PrivateRedis]:
    """Yield a Redis of the test's own, which survives ``kill`` and ``start`` with its data; some milliseconds."""
    yield from _private(request, PrivateRedis)


@pytest.fixture
def private_rabbitmq(request: pytest.FixtureRequest) -> Iterator[PrivateRabbitMQ]:
    """Yield a RabbitMQ of the test's own; several seconds."""
    yield from _private(request, PrivateRabbitMQ)


# -- places of a test's own -------------------------------------------------------------------------------------------------


@pytest.fixture(params=STORES)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yield the URL of an empty store. Its tables are visible through this URL alone."""
    match request.param:
        case "sqlite":
            yield sqlite_store(tmp_path)
        case "postgresql":
            with postgresql_store(request.getfixturevalue("postgresql_url")) as url:
                yield url
        case "mariadb":
            with mariadb_store(request.getfixturevalue("mariadb_url")) as url:
                yield url
        case _:
            raise ValueError(f"store_url is one of {STORES}, not {request.param!r}")


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    """Yield a broker with queues of this test's own."""
    match request.param:
        case "redis":
            yield redis_broker(request.getfixturevalue("private_redis").url)
        case "rabbitmq-classic" | "rabbitmq-quorum":
            url = request.getfixturevalue("rabbitmq_url")
            with rabbitmq_broker(url, queue_type=request.param.removeprefix("rabbitmq-")) as broker:
                yield broker
        case "filesystem":
            yield filesystem_broker(tmp_path)
        case _:
            raise ValueError(f"broker is one of {BROKERS}, not {request.param!r}")


@pytest.fixture
def broker_url(broker: Broker) -> str:
    """Return the address of ``broker``; on a shared server, the names on it come from ``broker`` too."""
    return broker.url


# -- apps and workers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Where the test's tasks note what they do."""
    return Ledger(tmp_path / "ledger.jsonl")


@pytest.fixture
def spec(broker: Broker, store_url: str, private_redis: PrivateRedis, ledger: Ledger) -> AppSpec:
    """Return the app of this test; ``dataclasses.replace`` makes another of it. Results go to a Redis of the test's own."""
    return AppSpec(
        broker=broker.url,
        backend=private_redis.url,
        store=store_url,
        queue=broker.queue,
        ledger=str(ledger.path),
        transport_options=broker.transport_options,
        settings=broker.settings,
    )


@pytest.fixture
def open_app() -> Iterator[OpenApp]:
    """Build an app in this process, its queue log's table made; its connections are closed in the end."""
    apps: list[Celery] = []

    def open_app(spec: AppSpec) -> Celery:
        app = spec.build()
        apps.append(app)
        app.finalize()
        if spec.base == "idempotent":
            app.queue_log.init()
        return app

    yield open_app
    for app in apps:
        close_app(app)


@pytest.fixture
def start_worker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StartWorker]:
    """Start workers; what is left of them in the end is killed. Their logs go with the report of a failure."""
    workers: list[WorkerProcess] = []

    def start_worker(spec: AppSpec, *, wait: bool = True, **options: Any) -> WorkerProcess:
        worker = WorkerProcess(tmp_path, spec.environment(), **options)
        workers.append(worker)
        attach_log(request, f"worker {worker.hostname}", worker.log_tail)
        return worker.start(wait=wait)

    yield cast("StartWorker", start_worker)
    for worker in workers:
        worker.stop()


# -- reports ----------------------------------------------------------------------------------------------------------------


def attach_log(request: pytest.FixtureRequest, name: str, tail: Callable[[], str]) -> None:
    """Put the end of a log into the report of the test that runs, if that fails."""
    request.node.stash.setdefault(LOGS, {})[name] = tail


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the logs of a failed test's workers and servers into its report."""
    report = yield
    if report.failed:
        report.sections += [(f"log of {name}", tail()) for name, tail in item.stash.get(LOGS, {}).items()]
    return report
