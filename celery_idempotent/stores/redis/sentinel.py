"""A server that Sentinels watch: whichever one they say is the master, asked whenever a connection is made."""

from __future__ import annotations

from redis.connection import Connection, SSLConnection
from redis.exceptions import ConnectionError, RedisError, ResponseError  # noqa: A004 - redis-py's name

from celery_idempotent.stores.redis.connection import Server, connect
from celery_idempotent.stores.redis.pool import Place, Wire, ask, read_replies

__all__ = ["Sentinels"]

#: Seconds for a Sentinel to answer before the next one is asked.
PATIENCE = 2.0


class Sentinels(Server):
    """The master, as the store's operations see it."""

    def _connect(self, place: Place) -> Wire:  # noqa: ARG002 - wherever it is
        host, port = self._master()
        wire = connect(self._address, host=host, port=port)
        # A Sentinel that was cut off may name one that is none any more.
        ask(wire, [(b"ROLE",)])
        (role,) = read_replies(wire, 1)
        # An account may not be allowed to ask; then the first write tells.
        if not isinstance(role, ResponseError) and role[0] != b"master":
            wire.disconnect()
            raise ConnectionError(f"{host}:{port}, which the Sentinels call the master, is a {role[0].decode()}")
        return wire

    def _master(self) -> Place:
        """Where the master is, by the first Sentinel that knows."""
        why = ""
        for host, port in self._address.hosts:
            options = {"socket_connect_timeout": PATIENCE, "socket_timeout": PATIENCE, **self._address.sentinel_options}
            kind = SSLConnection if self._address.connection is SSLConnection else Connection
            sentinel: Wire = kind(host=host, port=port, **options)
            try:
                sentinel.connect()
                ask(sentinel, [(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._address.master_name.encode())])
                (found,) = read_replies(sentinel, 1)
            except (RedisError, OSError) as error:
                why = str(error)
                continue
            finally:
                sentinel.disconnect()
            if isinstance(found, list):
                return found[0].decode(), int(found[1])
            why = f"{host}:{port} knows no master of that name" if found is None else str(found)
        raise ConnectionError(f"no Sentinel names the master {self._address.master_name!r}: {why}")
