"""A database that takes nothing for a while: an atomic message waits for it, as a plain one does, and does not fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from celery_idempotent.core.records import ProcessedStatus
from tests.integration.worker.atomic.test_workers import TIMEOUT, AtomicDeployment, deploy  # noqa: F401 - a fixture
from tests.support.servers import PrivatePostgreSQL
from tests.support.waiting import wait_until
from tests.support.worker import WorkerProcess

#: Seconds for which the database takes nothing.
OUTAGE = 6.0

pytestmark = [pytest.mark.parametrize("broker", ["redis"], indirect=True), pytest.mark.timeout(300)]


@pytest.fixture
def store_url(private_postgresql: PrivatePostgreSQL) -> str:
    url = sa.make_url(private_postgresql.url).update_query_dict({"options": "-c lock_timeout=300ms"})
    return url.render_as_string(hide_password=False)


@pytest.fixture
def server(private_postgresql: PrivatePostgreSQL) -> Iterator[sa.Engine]:
    engine = sa.create_engine(private_postgresql.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    yield engine
    engine.dispose()


def said(worker: WorkerProcess, text: str) -> None:
    wait_until(lambda: text in worker.log_tail(200), timeout=TIMEOUT, describe=lambda: worker.log_tail(50))


def wait(seconds: float) -> None:
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > seconds, timeout=TIMEOUT)


def test_for_a_database_that_is_read_only(deploy: Callable[..., AtomicDeployment], server: sa.Engine) -> None:  # noqa: F811
    deployment = deploy(idempotent_lease=60.0)
    worker = deployment.worker()
    gate = deployment.gate()
    result = deployment.send("atomic.late", "paid", str(gate))
    deployment.wait_for_starts("atomic.late", result)

    def read_only(value: str) -> None:
        with server.connect() as connection:
            connection.exec_driver_sql(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            connection.exec_driver_sql("SELECT pg_reload_conf()")

    read_only("on")
    gate.touch()
    said(worker, "cannot execute")
    wait(OUTAGE)
    with server.connect().execution_options(postgresql_readonly=False) as connection:
        connection.exec_driver_sql("SET default_transaction_read_only = off")
        connection.exec_driver_sql("ALTER SYSTEM SET default_transaction_read_only = off")
        connection.exec_driver_sql("SELECT pg_reload_conf()")

    row = deployment.wait_until_done("atomic.late", result)
    assert row.processed_status is ProcessedStatus.SUCCESS, row.error
    assert deployment.effects.names() == ["paid"]


def test_for_a_connection_when_there_are_too_many(deploy: Callable[..., AtomicDeployment], server: sa.Engine) -> None:  # noqa: F811
    deployment = deploy(idempotent_lease=60.0, idempotent_recovery_interval=0)
    worker = deployment.worker()
    gate = deployment.gate()
    result = deployment.send("atomic.late", "paid", str(gate))
    deployment.wait_for_starts("atomic.late", result)

    with ExitStack() as others:
        with pytest.raises(OperationalError, match="too many"):  # noqa: PT012
            while True:
                others.enter_context(closing(server.connect()))
        gate.touch()
        said(worker, "is run again")
        wait(OUTAGE)

    row = deployment.wait_until_done("atomic.late", result)
    assert row.processed_status is ProcessedStatus.SUCCESS, row.error
    assert deployment.effects.names() == ["paid"]
    assert len(deployment.ledger.starts("atomic.late")) == 2, "the body is not run over and over"


def test_for_a_lock_on_the_table(deploy: Callable[..., AtomicDeployment], server: sa.Engine) -> None:  # noqa: F811
    """With PostgreSQL's ``lock_timeout``, while somebody changes the table."""
    deployment = deploy(idempotent_lease=60.0)
    deployment.worker()
    gate = deployment.gate()
    result = deployment.send("atomic.late", "paid", str(gate))
    deployment.wait_for_starts("atomic.late", result)

    with server.connect().execution_options(isolation_level="READ COMMITTED") as connection, connection.begin():
        connection.exec_driver_sql("LOCK TABLE queue_log IN ACCESS EXCLUSIVE MODE")
        Path(gate).touch()
        wait(OUTAGE)

    row = deployment.wait_until_done("atomic.late", result)
    assert row.processed_status is ProcessedStatus.SUCCESS, row.error
    assert deployment.effects.names() == ["paid"]
