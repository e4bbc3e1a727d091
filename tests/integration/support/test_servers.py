"""The servers that a test may do anything to, and what becomes of a test whose server is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa

from tests.support.servers import KINDS, PrivatePgBouncer, PrivatePostgreSQL, PrivateRedis
from tests.support.servers.reach import why_unreachable

ROOT = Path(__file__).resolve().parents[3]
NOBODY_THERE = "postgresql+psycopg://postgres@127.0.0.1:1/test"


@contextmanager
def database(url: str) -> Iterator[sa.Connection]:
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        yield connection


def test_a_killed_postgresql_comes_back_with_what_was_committed(private_postgresql: PrivatePostgreSQL) -> None:
    with database(private_postgresql.url) as connection:
        connection.execute(sa.text("CREATE TABLE kept AS SELECT 1 AS value"))

    private_postgresql.kill()
    assert "refused" in str(why_unreachable(private_postgresql.url))
    private_postgresql.start()

    with database(private_postgresql.url) as connection:
        assert connection.scalar(sa.text("SELECT value FROM kept")) == 1


def test_a_restarted_postgresql_has_ended_its_sessions(private_postgresql: PrivatePostgreSQL) -> None:
    with database(private_postgresql.url) as connection:
        private_postgresql.restart()
        with pytest.raises(sa.exc.OperationalError):
            connection.execute(sa.text("SELECT 1"))


def test_clients_of_a_pooler_share_its_connections(private_pgbouncer: PrivatePgBouncer) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(database(private_pgbouncer.url)) for _ in range(10)]
        assert len({client.scalar(sa.text("SELECT pg_backend_pid()")) for client in clients}) <= 4


def test_a_killed_redis_comes_back_with_what_was_written(private_redis: PrivateRedis) -> None:
    with redis.Redis.from_url(private_redis.url) as client:
        client.set("kept", 1)

    private_redis.kill()
    assert "refused" in str(why_unreachable(private_redis.url))
    private_redis.start()

    with redis.Redis.from_url(private_redis.url) as client:
        assert client.get("kept") == b"1"


def test_a_paused_redis_takes_connections_and_does_not_answer(private_redis: PrivateRedis) -> None:
    private_redis.pause()
    assert "Timeout" in str(why_unreachable(private_redis.url))

    private_redis.resume()
    assert why_unreachable(private_redis.url) is None


def test_a_closed_server_leaves_no_process_and_no_file() -> None:
    with PrivateRedis() as server:
        directory, url = server.directory, server.url
        assert directory.exists()

    assert not directory.exists()
    assert "refused" in str(why_unreachable(url))


def test_each_store_is_empty_and_its_own(store_url: str) -> None:
    with database(store_url) as connection:
        assert sa.inspect(connection).get_table_names() == []
        connection.execute(sa.text("CREATE TABLE mine (value INTEGER)"))
    with database(store_url) as connection:
        assert sa.inspect(connection).get_table_names() == ["mine"]


def test_a_test_without_its_server_is_skipped_locally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv(KINDS["postgresql"].variable, NOBODY_THERE)

    with pytest.raises(pytest.skip.Exception, match=r"postgresql at .*:1/test is needed and missing: .*refused"):
        KINDS["postgresql"].require()


def test_a_test_without_its_server_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv(KINDS["postgresql"].variable, NOBODY_THERE)

    with pytest.raises(pytest.fail.Exception, match=r"postgresql at .*:1/test is needed and missing: .*refused"):
        KINDS["postgresql"].require()


def test_a_command_is_given_the_servers_and_its_exit_status_counts() -> None:
    script = "import os, sys; print(os.environ['CELERY_IDEMPOTENT_TEST_REDIS']); sys.exit(7)"
    environment = {
        **os.environ,
        "CI": "",
        "CELERY_IDEMPOTENT_TEST_INSTALL": "0",
        "CELERY_IDEMPOTENT_TEST_POSTGRESQL": NOBODY_THERE,
    }

    run = subprocess.run(
        [sys.executable, "-m", "tests.support.servers", sys.executable, "-c", script],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 7
    assert run.stdout.startswith("redis://")
    assert "! NO POSTGRESQL: every test that needs it will be SKIPPED." in run.stderr
