"""What doctor finds on real servers, by how they are set and by what the rows show."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from kombu import Exchange, Queue
from redis import Redis

from celery_idempotent import QueueLog, SQLStore
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage
from celery_idempotent.stores import open_store
from tests.integration.doctor.conftest import MakeApp, codes, doctor_says, examine
from tests.support.cli import PROJECT, popen_arguments
from tests.support.servers import PrivatePgBouncer, PrivatePostgreSQL, PrivateRabbitMQ, PrivateRedis
from tests.support.servers.mariadb import PrivateMariaDB

#: A private server is made to be fast; these are the settings with which one would run it.
DURABLE = ("fsync = on", "synchronous_commit = on")


# -- Redis ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def admin(good_redis: PrivateRedis) -> Iterator[Redis]:
    with Redis.from_url(good_redis.url) as client:
        yield client


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"appendonly": "no"}, ["redis-appendonly"]),
        ({"appendfsync": "no"}, ["store-durability"]),
        # The same server is the broker.
        ({"maxmemory": "1gb", "maxmemory-policy": "allkeys-lru"}, ["redis-eviction", "broker-eviction"]),
        ({"maxmemory": "1gb", "maxmemory-policy": "volatile-ttl"}, []),
        ({"maxmemory-policy": "allkeys-lru"}, []),
    ],
)
def test_a_redis_that_forgets(make_app: MakeApp, admin: Redis, settings: dict[str, str], found: list[str]) -> None:
    app = make_app()
    for name, value in settings.items():
        admin.config_set(name, value)
    assert codes(app) == found


@pytest.mark.parametrize(("rights", "found"), [("+info", []), ("", ["store-configuration"])])
def test_an_account_that_may_not_ask_for_settings(
    make_app: MakeApp, admin: Redis, good_redis: PrivateRedis, rights: str, found: list[str]
) -> None:
    admin.execute_command(
        "ACL", "SETUSER", "shop", "on", ">secret", "~*", "&*", "+@all", "-config", "-info", *rights.split()
    )  # type: ignore[no-untyped-call]
    url = good_redis.url.replace("redis://", "redis://shop:secret@")
    assert codes(make_app(idempotent_store=url)) == found


def test_a_layout_of_another_version(make_app: MakeApp, admin: Redis) -> None:
    app = make_app()
    (key,) = admin.keys("*layout")
    admin.set(key, "99")
    (found,) = examine(app)
    assert (found.code, "layout 99" in found.what) == ("schema", True)


def test_nothing_is_made_in_a_new_redis(make_app: MakeApp, admin: Redis) -> None:
    assert codes(make_app(init=False)) == []
    assert admin.keys("*queue_log*") == []


# -- PostgreSQL ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sql(private_postgresql: PrivatePostgreSQL) -> Callable[[str], None]:
    """Give a private PostgreSQL settings; it is durable to begin with."""
    engine = sa.create_engine(private_postgresql.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    def sql(statement: str) -> None:
        with engine.connect() as connection:
            connection.execute(sa.text(statement))

    return sql


@pytest.fixture
def durable(private_postgresql: PrivatePostgreSQL, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of one that syncs its writes, which the tests' own ones do not."""
    fast = private_postgresql.command()
    synced = [part.replace("fsync=off", "fsync=on") for part in fast]
    monkeypatch.setattr(private_postgresql, "command", lambda: synced)
    private_postgresql.restart()
    return private_postgresql.url


def test_a_postgresql_that_is_set_as_it_comes(
    make_app: MakeApp, durable: str, sql: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    app = make_app(init=False, idempotent_store=durable, task={"atomic": True})
    status, said = doctor_says(app, capsys)
    assert (status, [each["code"] for each in said["findings"]]) == (1, ["schema"])
    QueueLog.of(app).init()
    assert codes(app) == []

    sql("ALTER DATABASE test SET default_transaction_isolation = 'repeatable read'")
    QueueLog.of(app).close()
    (found,) = examine(app)
    assert (found.code, found.tasks) == ("isolation-renewal", ("shop.charge",))
    QueueLog.of(app).isolation_level = "READ COMMITTED"
    assert codes(app) == []

    sql("ALTER DATABASE test SET synchronous_commit = off")
    QueueLog.of(app).close()
    assert codes(app) == ["store-durability"]

    sql("ALTER DATABASE test RESET ALL")
    sql("DROP INDEX queue_log_open")
    QueueLog.of(app).close()
    (found,) = examine(app)
    assert (found.code, "create the index queue_log_open" in found.what) == ("schema-behind", True)
    QueueLog.of(app).init()
    assert codes(app) == []

    sql("ALTER TABLE queue_log DROP COLUMN takeovers")
    QueueLog.of(app).close()
    (found,) = examine(app)
    assert (found.code, "lacks takeovers" in found.what) == ("schema", True)

    sql("ALTER DATABASE test SET default_transaction_read_only = on")
    QueueLog.of(app).close()
    assert codes(app) == ["schema", "store-read-only"]


def test_a_postgresql_without_fsync(make_app: MakeApp, private_postgresql: PrivatePostgreSQL) -> None:
    app = make_app(idempotent_store=private_postgresql.url)
    (found,) = examine(app)
    assert (found.code, found.what.startswith("fsync is off")) == ("store-durability", True)


def test_a_store_that_is_away_or_frozen_is_a_finding(
    make_app: MakeApp, durable: str, private_postgresql: PrivatePostgreSQL
) -> None:
    app = make_app(idempotent_store=durable)
    private_postgresql.stop()
    (found,) = examine(app)
    assert (found.code, "gave no answer" in found.what) == ("store-unreachable", True)


def test_a_right_that_is_missing_is_a_finding(make_app: MakeApp, durable: str, sql: Callable[[str], None]) -> None:
    make_app(idempotent_store=durable)
    sql("CREATE ROLE nobody LOGIN")
    (found,) = examine(make_app(init=False, idempotent_store=durable.replace("postgres@", "nobody@")))
    assert (found.code, "permission denied" in found.what) == ("store-refused", True)


def test_an_engine_with_named_statements_behind_a_pooler_is_found(
    make_app: MakeApp, durable: str, private_postgresql: PrivatePostgreSQL
) -> None:
    with PrivatePgBouncer(durable) as pooler:
        engines = [
            sa.create_engine(pooler.url),
            sa.create_engine(pooler.url, connect_args={"prepare_threshold": None}),
            sa.create_engine(durable),
        ]
        app = make_app(idempotent_store=durable)
        found = []
        for engine in engines:
            QueueLog(app, store=SQLStore(engine))
            found.append([code for code in codes(app) if code == "pooler-prepares"])
            QueueLog.of(app).close()
            engine.dispose()
        assert found == [["pooler-prepares"], [], []]
        assert "pooler-prepares" not in codes(make_app(idempotent_store=pooler.url)), "which is the store's own engine"


# -- MariaDB, SQLite -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mariadb() -> Iterator[PrivateMariaDB]:
    with PrivateMariaDB() as server:
        yield server


def test_how_mariadb_is_set(make_app: MakeApp, mariadb: PrivateMariaDB) -> None:
    def with_(**settings: str) -> str:
        said = ", ".join(f"{name} = {value}" for name, value in settings.items())
        return f"{mariadb.url}?init_command=SET {said}"

    engine = sa.create_engine(mariadb.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.execute(sa.text("SET GLOBAL innodb_flush_log_at_trx_commit = 1"))
    atomic = {"atomic": True}

    assert codes(make_app(idempotent_store=mariadb.url, task=atomic)) == []
    dirty = with_(tx_isolation="'READ-UNCOMMITTED'")
    assert codes(make_app(idempotent_store=dirty)) == ["isolation-dirty"]
    fixed = with_(innodb_snapshot_isolation="ON")
    assert codes(make_app(idempotent_store=fixed, task=atomic)) == ["isolation-renewal"]
    assert codes(make_app(idempotent_store=fixed)) == []
    committed = with_(innodb_snapshot_isolation="ON", tx_isolation="'READ-COMMITTED'")
    assert codes(make_app(idempotent_store=committed, task=atomic)) == []

    with engine.connect() as connection:
        connection.execute(sa.text("SET GLOBAL innodb_flush_log_at_trx_commit = 2"))
    assert codes(make_app(idempotent_store=mariadb.url)) == ["store-durability"]
    with engine.connect() as connection:
        connection.execute(sa.text("SET GLOBAL innodb_flush_log_at_trx_commit = 1, GLOBAL read_only = ON"))
    assert codes(make_app(init=False, idempotent_store=mariadb.url)) == ["store-read-only"]


def test_sqlite_is_for_one_host_and_is_not_made(
    make_app: MakeApp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path / 'log.db'}"
    app = make_app(init=False, idempotent_store=url)
    assert codes(app) == []
    assert not list(tmp_path.iterdir())

    QueueLog.of(app).init()
    assert codes(app) == []
    app.conf.broker_url = "redis://broker.invalid:6379/0"
    status, said = doctor_says(app, capsys)
    assert (status, [each["code"] for each in said["findings"]]) == (1, ["broker-unreachable", "store-local-file"])
    assert codes(make_app(init=False, idempotent_store="sqlite://")) == ["store-in-memory"]


# -- RabbitMQ ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[PrivateRabbitMQ]:
    with PrivateRabbitMQ(consumer_timeout=900.0) as server:
        yield server


def test_how_rabbitmq_is_set(make_app: MakeApp, rabbitmq: PrivateRabbitMQ) -> None:
    def queues(kind: str = "topic", /, **arguments: object) -> list[Queue]:
        arguments = {"x-queue-type": "quorum", **arguments}
        return [Queue("celery", Exchange("celery", kind), routing_key="celery", queue_arguments=arguments)]

    def app(**settings: object) -> list[str]:
        app = make_app(**settings)
        app.conf.broker_url = rabbitmq.url
        return codes(app)

    assert app() == []
    # It does not tell its consumer_timeout, and its default is half an hour.
    assert app(task_time_limit=1000) == []
    made = make_app(task_time_limit=1000)
    made.conf.broker_url = rabbitmq.url
    (found,) = examine(made, consumer_timeout=900.0)
    assert (found.code, "900 s" in found.what) == ("consumer-timeout-time-limit", True)
    assert app(task_time_limit=1800) == ["consumer-timeout-time-limit"]
    assert app(task_time_limit=100, task_queues=queues(**{"x-consumer-timeout": 90_000})) == [
        "consumer-timeout-time-limit"
    ]
    assert app(task={"default_retry_delay": 1800}) == ["consumer-timeout-eta"]
    # Quorum queues have RabbitMQ keep what is not due yet.
    assert app(task={"default_retry_delay": 1800}, task_queues=queues()) == []
    assert app(task={"default_retry_delay": 1800}, task_queues=queues("direct")) == ["consumer-timeout-eta"]
    assert app(task={"lease": 120}, task_queues=[Queue("celery", queue_arguments={"x-consumer-timeout": 60_000})]) == [
        "consumer-timeout-lease"
    ]
    assert app(task_queues=queues(**{"x-delivery-limit": 3})) == ["delivery-limit"]
    assert app(task_queues=queues(**{"x-delivery-limit": -1})) == []


# -- the rows ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, good_redis: PrivateRedis, tmp_path: Path) -> str:
    return good_redis.url if request.param == "redis" else f"sqlite:///{tmp_path / 'log.db'}"


def test_a_message_that_waits_for_longer_than_the_visibility_timeout(make_app: MakeApp, url: str) -> None:
    app = make_app(idempotent_store=url)
    app.tasks["shop.charge"].apply_async(("o-1",), countdown=600)
    assert codes(app) == []
    app.tasks["shop.charge"].apply_async(("o-2",), countdown=7200)
    (found,) = examine(app)
    assert (found.code, "a message waits 7200 s" in found.what or "7199 s" in found.what) == ("visibility-eta", True)


@pytest.mark.parametrize("left", ["lapsed", "unsent"])
def test_messages_without_recovery_are_found(make_app: MakeApp, tmp_path: Path, left: str) -> None:
    url = f"sqlite:///{tmp_path / 'log.db'}"
    app = make_app(idempotent_store=url)
    with closing(SQLStore(url)) as store:
        new = NewMessage(MessageKey("m", "shop.charge"), "id", "celery", published=left != "unsent", message=b"")
        store.record(new)
        if left == "lapsed":
            claimed = store.claim(new, worker="w:1", lease=60.0, grace=0.0)
            assert isinstance(claimed, Claimed)
            store.expire(claimed.claim)
        assert codes(app) == []
        table = sa.table("queue_log", *map(sa.column, ("created_timestamp", "published_at", "lease_expires_at")))
        with store.engine.begin() as connection:
            aged = {
                name: sa.func.strftime("%Y-%m-%d %H:%M:%f000", sa.column(name), "-300 seconds")
                for name in ("created_timestamp", "published_at", "lease_expires_at")
            }
            connection.execute(sa.update(table).values(aged))
        (found,) = examine(app)
        assert found.code == "recovery-behind"
        assert ("was not published again" in found.what) == (left == "lapsed")


def test_rows_without_a_purge_are_found(make_app: MakeApp, url: str) -> None:
    app = make_app(idempotent_store=url)
    with closing(open_store(url)) as store:
        new = NewMessage(MessageKey("m", "shop.charge"), "id", "celery", message=b"")
        claimed = store.claim(new, worker="w:1", lease=60.0, grace=0.0)
        assert isinstance(claimed, Claimed)
        store.complete(claimed.claim, result=None)
        done = store.health().done_since
        assert done is not None
        assert codes(app) == []
    two_days = timedelta(days=2).total_seconds()
    if url.startswith("sqlite"):
        with closing(SQLStore(url)) as old, old.engine.begin() as connection:
            moment = sa.func.strftime("%Y-%m-%d %H:%M:%f000", sa.column("processed_timestamp"), f"-{two_days} seconds")
            table = sa.table("queue_log", sa.column("processed_timestamp"))
            connection.execute(sa.update(table).values(processed_timestamp=moment))
    else:
        with Redis.from_url(url) as client:
            (index,) = client.keys("*:done")
            ((ident, score),) = client.zrange(index, 0, -1, withscores=True)
            client.zadd(index, {ident: score - two_days * 1e6})
    app = make_app(idempotent_store=url, idempotent_retention=5000, idempotent_failure_retention=5000)
    assert codes(app) == ["purge-behind"]


# -- as people and scripts run it ----------------------------------------------------------------------------------------------


def test_for_people_and_for_scripts(good_redis: PrivateRedis, tmp_path: Path) -> None:
    (tmp_path / "proj.py").write_text(PROJECT)
    week = 7 * 24 * 3600  # as long as rows are kept
    settings = {"task_acks_late": True, "result_backend": good_redis.url, "result_expires": week}

    def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = popen_arguments(tmp_path, "idempotent", "doctor", *arguments, app="proj", **environment)
        return subprocess.run(**given, capture_output=True, text=True, check=False, timeout=100)

    there = {"store": good_redis.url, "BROKER": good_redis.url, "SETTINGS": repr(settings)}
    run = doctor(**there)
    assert (run.returncode, run.stderr) == (3, "")
    lines = run.stdout.splitlines()
    assert lines[0].startswith(f"broker redis://:**@127.0.0.1:{good_redis.port}/0, store RedisStore(")
    assert lines[2] == "warning late-ack-worker-lost: acks_late without reject_on_worker_lost"
    assert [line.split()[0] for line in lines[3:7]] == ["at", "set", "tasks", "see"]
    assert lines[-1] == "errors: 0, warnings: 1"

    run = doctor("--ignore", "late-ack-worker-lost", **there)
    assert (run.returncode, run.stdout.splitlines()[-1]) == (0, "nothing was found")
    run = doctor("--ignore", "nonsense", **there)
    assert (run.returncode, run.stdout) == (2, "")

    away = {
        "store": "postgresql://u:secret@127.0.0.1:1/x",
        "BROKER": "redis://:secret@127.0.0.1:1/0",
        "SETTINGS": repr(settings),
    }
    run = doctor("--json", **away)
    assert (run.returncode, run.stderr) == (1, "")
    found = [each["code"] for each in json.loads(run.stdout)["findings"]]
    assert found == ["broker-unreachable", "store-unreachable", "late-ack-worker-lost"]
    assert "secret" not in run.stdout
