"""Is there a server at an address that takes our name and password, and if not, why not?"""

from __future__ import annotations

from collections.abc import Callable

import redis
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import NullPool, create_engine, make_url
from sqlalchemy.exc import SQLAlchemyError

__all__ = ["why_unreachable"]

#: Seconds for one try.
TIMEOUT = 3.0


def why_unreachable(url: str) -> str | None:
    """``None`` when a real client could connect, else the reason in one line."""
    try:
        _CONNECT[make_url(url).get_backend_name()](url)
    except (SQLAlchemyError, redis.RedisError, OperationalError, OSError) as error:
        reason = getattr(error, "orig", None) or error
        return f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"
    return None


def _connect_database(url: str) -> None:
    # PyMySQL's `connect_timeout` ends with TCP's handshake; a server that accepts and says nothing is `read_timeout`'s.
    timeouts = ("connect_timeout",) if url.startswith("postgresql") else ("connect_timeout", "read_timeout")
    with create_engine(url, poolclass=NullPool, connect_args=dict.fromkeys(timeouts, int(TIMEOUT))).connect():
        pass


def _connect_redis(url: str) -> None:
    once = Retry(NoBackoff(), 0)
    with redis.Redis.from_url(url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, retry=once) as client:
        client.ping()


def _connect_rabbitmq(url: str) -> None:
    with Connection(url, connect_timeout=TIMEOUT) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=TIMEOUT)


_CONNECT: dict[str, Callable[[str], None]] = {
    "amqp": _connect_rabbitmq,
    "mariadb": _connect_database,
    "mysql": _connect_database,
    "postgresql": _connect_database,
    "redis": _connect_redis,
}
