"""A connection that a NAT or a firewall has forgotten, and a server that lost its office: both are noticed, and soon."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import sqlalchemy as sa

from celery_idempotent.core.records import Inserted, MessageKey
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.stores.sql import SQLStore, sockets
from celery_idempotent.testing.examples import claim, new_message, pending
from tests.support.proxy import Proxy
from tests.support.servers import (
    PrivateMariaDB,
    PrivatePostgreSQL,
    PrivateServer,
    skip_if_not_installed,
)
from tests.support.waiting import wait_until

on_servers = pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)


# -- silence ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(store_url: str) -> Iterator[Proxy]:
    with Proxy(store_url) as proxy:
        yield proxy


@on_servers
def test_no_connection_waits_for_minutes_for_a_host_out_of_reach(store: SQLStore, store_url: str) -> None:
    owner = sa.create_engine(store_url)
    owned = SQLStore(owner)
    for engine in (
        store._database._here().for_statements,
        store.engine,
        owned._database._here().for_statements,
    ):
        with engine.connect() as connection:
            descriptor = store._dialect.socket(connection.connection.dbapi_connection)
            assert descriptor is not None
            with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as end:
                tcp = {
                    name: end.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
                }
                assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert tcp["TCP_KEEPIDLE"] + tcp["TCP_KEEPINTVL"] * tcp["TCP_KEEPCNT"] <= 60, tcp
        assert 0 < tcp["TCP_USER_TIMEOUT"] <= 60_000
    owned.close()
    owner.dispose()


@on_servers
def test_a_body_on_a_forgotten_connection_raises(
    store: SQLStore, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_RECEIVED_WITHIN", 1)
    mine = SQLStore(proxy.url)
    with mine.engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
        proxy.forget_connections()
        began = time.monotonic()
        with pytest.raises(sa.exc.DBAPIError) as caught:
            connection.execute(sa.text("SELECT 2"))
        assert time.monotonic() - began < 30
        assert mine.gave_way(caught.value), "so that the body runs again"
    with mine.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT 3")).scalar() == 3
    mine.close()


@on_servers
def test_a_forgotten_connection_of_the_pool_is_replaced(
    store: SQLStore, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_RECEIVED_WITHIN", 1)
    mine = SQLStore(proxy.url)
    pending(mine)
    proxy.forget_connections()
    assert claim(mine).token == 1
    mine.close()


# -- failover -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["postgresql", "mariadb"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[PrivateServer, PrivateServer]]:
    """Two servers, and an account ``app`` on both that cannot write where it is read only."""
    kind = {"postgresql": PrivatePostgreSQL, "mariadb": PrivateMariaDB}[request.param]
    with skip_if_not_installed(), ExitStack() as stack:
        servers = [stack.enter_context(kind()) for _ in range(2)]
        if request.param == "mariadb":
            for server in servers:
                _administer(server, "CREATE USER app@'%'", "GRANT ALL ON test.* TO app@'%'")
        yield servers[0], servers[1]


def _administer(server: PrivateServer, *statements: str) -> None:
    engine = sa.create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))


def _is_read_only(server: PrivateServer) -> bool:
    engine = sa.create_engine(server.url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return bool(connection.execute(sa.text("SHOW default_transaction_read_only")).scalar() == "on")


def make_read_only(server: PrivateServer) -> None:
    if isinstance(server, PrivateMariaDB):
        _administer(server, "SET GLOBAL read_only = 1")
    else:
        _administer(server, "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
        # It tells its older processes before it starts a new one.
        wait_until(lambda: _is_read_only(server), timeout=10, describe="the configuration is read")


def as_app(url: str) -> str:
    made = sa.make_url(url)
    made = made if made.get_backend_name() == "postgresql" else made.set(username="app")
    return made.render_as_string(hide_password=False)


def test_a_server_that_is_read_only_now_is_left(pair: tuple[PrivateServer, PrivateServer]) -> None:
    old, new = pair
    for server in pair:
        store = SQLStore(server.url)
        store.init()
        store.close()
    with Proxy(as_app(old.url)) as proxy, ExitStack() as stack:
        mine = SQLStore(proxy.url)
        engine = sa.create_engine(proxy.url)
        owned = SQLStore(engine)
        stack.callback(engine.dispose)
        stack.callback(mine.close)
        stack.callback(owned.close)
        for number, each in enumerate((mine, owned)):
            assert each.record(new_message(MessageKey(f"before-{number}", "t"))) == Inserted()
            with each.engine.connect() as body:
                body.execute(sa.text("UPDATE queue_log SET duplicates = 0"))
                body.commit()

        make_read_only(old)
        for each in (mine, owned):
            with pytest.raises(StoreUnavailableError) as caught:
                each.record(new_message(MessageKey("meanwhile", "t")))
            assert caught.value.unsent
            with each.engine.connect() as body, pytest.raises(sa.exc.DBAPIError) as refused:
                body.execution_options(celery_idempotent_watch=None).execute(
                    sa.text("UPDATE queue_log SET duplicates = 1")
                )
            assert each.gave_way(refused.value)
        proxy.lead_to(as_app(new.url))

        for number, each in enumerate((mine, owned)):
            assert each.record(new_message(MessageKey(f"after-{number}", "t"))) == Inserted()
            with each.engine.connect() as body:
                body.execute(sa.text("UPDATE queue_log SET duplicates = 1"))
                body.rollback()


def test_a_verb_goes_on_at_the_new_primary_at_once(pair: tuple[PrivateServer, PrivateServer]) -> None:
    old, new = pair
    for server in pair:
        store = SQLStore(server.url)
        store.init()
        store.close()
    with Proxy(as_app(old.url)) as proxy:
        mine = SQLStore(proxy.url)
        assert mine.record(new_message(MessageKey("before", "t"))) == Inserted()
        make_read_only(old)
        proxy.lead_to(as_app(new.url))
        assert mine.record(new_message(MessageKey("after", "t"))) == Inserted()
        mine.close()
