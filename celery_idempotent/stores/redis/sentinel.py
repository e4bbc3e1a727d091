"""A server that Sentinels watch. Ask them for the master before each new connection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redis.backoff import NoBackoff
from redis.connection import SSLConnection
from redis.exceptions import ConnectionError, ResponseError  # noqa: A004 - redis-py's name
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from celery_idempotent.stores.redis.connection import Server, connect
from celery_idempotent.stores.redis.pool import Connection, Place, ask, read_replies

__all__ = ["Sentinels"]

#: Seconds for a Sentinel to answer, before the next one is asked.
_OPTIONS: Mapping[str, Any] = {"socket_connect_timeout": 2.0, "socket_timeout": 2.0, "retry": Retry(NoBackoff(), 0)}


class Sentinels(Server):
    """The server that the Sentinels name as the master."""

    def _connect(self, place: Place) -> Connection:  # noqa: ARG002 - wherever it is
        host, port = self._master()
        connection = connect(self._address, host=host, port=port)
        # A Sentinel that was cut off may name a former master.
        ask(connection, [(b"ROLE",)])
        (role,) = read_replies(connection, 1)
        # If the account may not ask, the first write shows it.
        if not isinstance(role, ResponseError) and role[0] != b"master":
            connection.disconnect()
            raise ConnectionError(f"{host}:{port}, which the Sentinels call the master, is a {role[0].decode()}")
        return connection

    def _master(self) -> Place:
        """Return the master that is up, by the first Sentinel that names one."""
        secured = self._address.connection is SSLConnection
        options = {**_OPTIONS, "ssl": secured, **self._address.sentinel_options}
        sentinels: Any = Sentinel(self._address.hosts, sentinel_kwargs=options)  # type: ignore[no-untyped-call]
        name = self._address.master_name
        try:
            host, port = sentinels.discover_master(name)
        except MasterNotFoundError:
            # Not with its text, which has the Sentinels' password in redis-py 6 and 7.
            raise ConnectionError(f"no Sentinel that answers names the master {name!r}, or it is down") from None
        finally:
            for sentinel in sentinels.sentinels:
                sentinel.close()
        return host, port
