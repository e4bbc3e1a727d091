"""URLs: the forms that Celery's users know, mistakes, and no password in any text."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection

from celery_idempotent import RedisStore, SQLStore
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.stores import open_store
from celery_idempotent.stores.redis.address import parse


@pytest.mark.parametrize(
    ("url", "hosts", "options", "text"),
    [
        ("redis://", [("localhost", 6379)], {}, "redis://localhost:6379/0"),
        ("redis://h", [("h", 6379)], {}, "redis://h:6379/0"),
        ("redis://h:1/", [("h", 1)], {}, "redis://h:1/0"),
        ("redis://:p%40ss@h:1/2", [("h", 1)], {"password": "p@ss", "db": 2}, "redis://:***@h:1/2"),
        ("redis://u:p@h/2", [("h", 6379)], {"username": "u", "password": "p", "db": 2}, "redis://u:***@h:6379/2"),
        ("redis://h/0?socket_timeout=1.5", [("h", 6379)], {"socket_timeout": 1.5, "db": 0}, "redis://h:6379/0"),
        # A client's options, and what is the store's own business.
        ("redis://h?decode_responses=true&max_connections=7", [("h", 6379)], {}, "redis://h:6379/0"),
        ("rediss://h?ssl_cert_reqs=CERT_NONE", [("h", 6379)], {"ssl_cert_reqs": "none"}, "rediss://h:6379/0"),
        ("rediss://h?ssl_cert_reqs=required", [("h", 6379)], {"ssl_cert_reqs": "required"}, "rediss://h:6379/0"),
        ("redis+socket:///run/redis.sock?virtual_host=3", [], {"path": "/run/redis.sock", "db": 3}, None),
        ("unix:///run/redis.sock?db=3", [], {"path": "/run/redis.sock", "db": 3}, "unix:///run/redis.sock"),
        (
            "sentinel://:p@a:1;sentinel://b;sentinel://c:3/4?master_name=m",
            [("a", 1), ("b", 26379), ("c", 3)],
            {"password": "p", "db": 4},
            "sentinel://:***@a:1;b:26379;c:3/4",
        ),
        ("sentinel://a:1;b:2?master_name=m", [("a", 1), ("b", 2)], {}, "sentinel://a:1;b:2/0"),
        ("redis+cluster://:p@a;b:2", [("a", 6379), ("b", 2)], {"password": "p"}, "redis+cluster://:***@a:6379;b:2"),
    ],
)
def test_urls_are_read_as_celery_reads_them(
    url: str, hosts: list[tuple[str, int]], options: dict[str, Any], text: str | None
) -> None:
    address = parse(url)
    assert list(address.hosts) == hosts
    assert address.options == options
    assert text is None or address.text == text
    assert isinstance(open_store(url), RedisStore)


def test_the_class_of_connections_follows_the_scheme() -> None:
    assert parse("redis://h").connection is Connection
    assert parse("rediss://h").connection is SSLConnection
    assert parse("rediss+cluster://h").connection is SSLConnection
    assert parse("sentinel://h?master_name=m&ssl=true").connection is SSLConnection
    assert parse("redis+socket:///s").connection is UnixDomainSocketConnection


def test_sentinels_have_a_password_of_their_own() -> None:
    address = parse("sentinel://:p@h?master_name=m&sentinel_password=q&ssl=true&ssl_cert_reqs=CERT_NONE")
    assert address.sentinel_options == {"password": "q", "ssl_cert_reqs": "none"}
    assert address.options == {"password": "p", "ssl_cert_reqs": "none"}
    assert (address.kind, address.master_name) == ("sentinel", "m")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://:s3cret@h:port/0", "cannot be read; write it as redis://"),
        ("redis://:s3/cret@h/0", "cannot be read|names a database of Redis by its number"),
        ("redis://:s3cret@h/name", "names a database of Redis by its number"),
        ("redis://:s3cret@h/0?colour=s3cret", r"cannot be read \(an option is not known\)"),
        ("redis://:s3cret@h/0?socket_timeout=s3cret", "cannot be read"),
        ("rediss://:s3cret@h/0?ssl_cert_reqs=s3cret", "cannot be read"),
        ("sentinel://:s3cret@h:26379/0", "has to name the master"),
        ("redis+cluster://:s3cret@h/1", "has no other database than 0"),
        ("redis://:s3cret@h;h2/0", "names more than one server.*sentinel://.*redis[+]cluster://"),
        ("redis://:s3cret@h:1,h2:2/0", "names more than one server"),
        ("rediss://:s3cret@h;rediss://:s3cret@h2/0", "names more than one server"),
        ("redis://:s3cret@h/0?max_connections=0", "allows no connection"),
    ],
)
def test_a_bad_url_is_reported_without_its_password(url: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text) as caught:
        open_store(url)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__suppress_context__ or "s3cret" not in str(caught.value.__context__)


def test_an_unknown_scheme_raises() -> None:
    with pytest.raises(ConfigurationError, match="begins with mongodb://, which is not known"):
        RedisStore("mongodb://h")


def test_a_representation_hides_passwords() -> None:
    store = RedisStore("redis://shop:s3cret@h:1/2?client_name=s3cret", table="ops")
    assert repr(store) == "RedisStore('redis://shop:***@h:1/2', table='ops')"


def test_opening_a_store_connects_to_nothing() -> None:
    open_store("redis://192.0.2.1:1").close()
    open_store("sentinel://192.0.2.1:1?master_name=m").close()
    open_store("redis+cluster://192.0.2.1:1").close()


def test_a_store_of_another_kind_loads_no_client() -> None:
    script = (
        "import sys, celery_idempotent.stores as stores\n"
        "store = stores.open_store('sqlite://')\n"
        "print('redis' in sys.modules, type(store).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", SQLStore.__name__]
