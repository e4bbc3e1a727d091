"""The store: its verbs by role, and its life."""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

from collections.abc import Callable

from celery_idempotent.core.store import Change
from celery_idempotent.errors import SchemaError
from celery_idempotent.stores.redis.address import parse
from celery_idempotent.stores.redis.admin import Admin
from celery_idempotent.stores.redis.claims import Claims
from celery_idempotent.stores.redis.cluster import Cluster
from celery_idempotent.stores.redis.connection import Server
from celery_idempotent.stores.redis.layout import VERSION, Layout
from celery_idempotent.stores.redis.reading import Reading
from celery_idempotent.stores.redis.recording import Recording
from celery_idempotent.stores.redis.recovering import Recovering
from celery_idempotent.stores.redis.scripts import Script
from celery_idempotent.stores.redis.sentinel import Sentinels
from celery_idempotent.stores.redis.session import ScriptSession
from celery_idempotent.stores.redis.transitions import Transitions

__all__ = ["RedisStore"]

_SERVERS: dict[str, type[Server]] = {"server": Server, "sentinel": Sentinels, "cluster": Cluster}

# Whether the layout was marked now, and its version.
_INIT = Script("""
local made = redis.call('SETNX', tag .. ':layout', ARGV[1])
return {made, redis.call('GET', tag .. ':layout')}
""")

_VERSION = Script("return {redis.call('GET', tag .. ':layout')}")


class RedisStore(Recording, Claims, Transitions, Recovering, Reading, Admin):
    """The queue log in Redis: on a single server, on the master that Sentinels name, or in a Redis Cluster.

    Implements :class:`~celery_idempotent.core.store.Store`. It has no transactions for its users: ``atomic=True`` and ``outbox(session)``
    need a SQL store. Its rows are as durable as the server's settings make them, see "Keep the queue log in Redis".

    Safe between threads, greenlets and processes, and across forks: nothing is connected before the first verb, and each
    process connects for itself.

    Args:
        url: As for :func:`~celery_idempotent.stores.open_store`: ``redis://``, ``rediss://``, ``redis+socket://``,
            ``sentinel://`` or ``redis+cluster://``.
        table: The prefix of all keys of this log, where it stands in braces; the name itself has none.

    Raises:
        ConfigurationError: The URL or the table is not valid.
    """

    def __init__(self, url: str, *, table: str = "queue_log") -> None:
        layout, address = Layout(table), parse(url)
        super().__init__(_SERVERS[address.kind](address, layout, self._init))
        self._table = table

    def __repr__(self) -> str:
        return f"RedisStore({str(self._server)!r}, table={self._table!r})"

    def init(self, *, before: Callable[[Change], None] | None = None) -> bool:
        if before is not None:
            for change in self.outstanding():
                before(change)
        return self._run(self._init, prepared=False)

    def outstanding(self) -> list[Change]:
        return [] if self.inspect() else [Change(f"lay out {self._table}", alters=False)]

    def check(self) -> None:
        self._run(self._init, prepared=False)

    def inspect(self) -> bool:
        ((version,),) = self._run(lambda on: on.call_each(_VERSION, [(0, ())]), prepared=False)
        self._verify(version)
        return version is not None

    def close(self) -> None:
        self._server.close()

    def _init(self, on: ScriptSession) -> bool:
        """Mark the layout as this version's, unless it is marked; return whether that was done now."""
        ((made, version),) = on.call_each(_INIT, [(0, (VERSION,))])
        self._verify(version)
        return bool(made)

    def _verify(self, version: bytes | None) -> None:
        if version not in {None, VERSION}:
            assert version is not None
            raise SchemaError(
                f"the queue log at {self._server} has layout {version.decode(errors='replace')}, and this version of celery-idempotent "
                f"reads and writes layout {VERSION.decode()}: use the version that wrote it, or another table"
            )
