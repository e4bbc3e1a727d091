"""What the acceptance tests share: a guarded and a plain worker on each broker, started once.

``guarded`` and ``plain`` are shared workers (see :mod:`tests.support.side_by_side`); a test that asks for one runs once per broker::

    @pytest.mark.parametrize("both_workers", ["redis"], indirect=True)    # on one only

All tests on one broker's workers run in one process of pytest-xdist (``--dist loadgroup``), so that there is one pair of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import attach_log
from tests.support.brokers import Broker, filesystem_broker, rabbitmq_broker, redis_broker
from tests.support.servers import PrivateRedis, skip_if_not_installed
from tests.support.shared_workers import GuardedAndPlain, SharedWorker, open_both_workers
from tests.support.stores import mariadb_store, postgresql_store, sqlite_store

#: Each broker has another store, so that real workers use every store too.
STORE_BESIDE = {
    "redis": "postgresql",
    "rabbitmq-classic": "mariadb",
    "rabbitmq-quorum": "postgresql",
    "filesystem": "sqlite",
}


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[PrivateRedis]:
    """Yield a Redis for the workers of this session: results in database 0, messages in 1 (guarded) and 2 (plain)."""
    with skip_if_not_installed("a private Redis"), PrivateRedis() as server:
        yield server


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(f"workers-{name}")) for name in STORE_BESIDE],
)
def both_workers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_redis: PrivateRedis
) -> Iterator[GuardedAndPlain]:
    """Yield a guarded and a plain worker on one kind of broker."""
    directory = tmp_path_factory.mktemp(f"workers-{request.param}")
    with ExitStack() as stack:
        guarded, plain = (
            _broker(stack, request, name, directory / name, database)
            for database, name in enumerate(("guarded", "plain"), 1)
        )
        yield stack.enter_context(
            open_both_workers(
                directory,
                backend=shared_redis.url,
                store=_store(stack, request, directory),
                guarded=guarded,
                plain=plain,
            )
        )


def _broker(stack: ExitStack, request: pytest.FixtureRequest, name: str, directory: Path, database: int) -> Broker:
    kind = request.param
    if kind == "redis":
        server: PrivateRedis = request.getfixturevalue("shared_redis")
        return redis_broker(f"{server.url.removesuffix('/0')}/{database}")
    if kind == "filesystem":
        return filesystem_broker(directory)
    url = request.getfixturevalue("rabbitmq_url")
    return stack.enter_context(rabbitmq_broker(url, queue_type=kind.removeprefix("rabbitmq-")))


def _store(stack: ExitStack, request: pytest.FixtureRequest, directory: Path) -> str:
    match STORE_BESIDE[request.param]:
        case "postgresql":
            return stack.enter_context(postgresql_store(request.getfixturevalue("postgresql_url")))
        case "mariadb":
            return stack.enter_context(mariadb_store(request.getfixturevalue("mariadb_url")))
        case _:
            return sqlite_store(directory)


@pytest.fixture
def guarded(both_workers: GuardedAndPlain, request: pytest.FixtureRequest) -> SharedWorker:
    """Return the guarded worker and its app."""
    return _with_log(both_workers.guarded, request)


@pytest.fixture
def plain(both_workers: GuardedAndPlain, request: pytest.FixtureRequest) -> SharedWorker:
    """Return the same tasks on Celery's own class."""
    return _with_log(both_workers.plain, request)


def _with_log(shared_worker: SharedWorker, request: pytest.FixtureRequest) -> SharedWorker:
    attach_log(request, f"worker {shared_worker.worker.hostname}", shared_worker.worker.log_tail)
    return shared_worker
