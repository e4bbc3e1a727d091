"""Unit tests need Python alone: one that asks for a server, or connects to one, fails."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NoReturn

import pytest

UNIT = Path(__file__).resolve().parent

_now: pytest.Item | None = None


def _refuse(name: str) -> Callable[[], NoReturn]:
    @pytest.fixture(name=name)
    def refuse() -> NoReturn:
        pytest.fail(f"a unit test cannot have {name}: it needs a server, see tests/integration", pytrace=False)

    return refuse


postgresql_url, mariadb_url, redis_url, rabbitmq_url = map(
    _refuse, ["postgresql_url", "mariadb_url", "redis_url", "rabbitmq_url"]
)
private_postgresql, private_pgbouncer, private_redis, private_rabbitmq = map(
    _refuse, ["private_postgresql", "private_pgbouncer", "private_redis", "private_rabbitmq"]
)


def _watch_connections(event: str, arguments: tuple[Any, ...]) -> None:
    # Of the test's thread only: in a run of all tests, threads of others may still be at work. libpq connects unseen; but who
    # gave it the address?
    if event == "socket.connect" and _now is not None and threading.current_thread() is threading.main_thread():
        address = arguments[1]
        if isinstance(address, tuple):
            pytest.fail(f"{_now.nodeid} connects to {address}: a unit test needs Python alone", pytrace=False)


sys.addaudithook(_watch_connections)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Watch while a test of this folder runs, its fixtures included."""
    global _now  # noqa: PLW0603 - an audit hook cannot be taken back, so it has to look
    # pytest calls this hook for the tests of other folders too.
    _now = item if UNIT in item.path.parents else None
    try:
        return (yield)
    finally:
        _now = None
