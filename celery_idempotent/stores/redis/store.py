"""The store: the port's verbs, each run on a connection."""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime

from celery_idempotent.core.records import (
    Change,
    Claim,
    Claimed,
    Duplicate,
    Holder,
    Inserted,
    LogHealth,
    MessageKey,
    NewMessage,
    NoResultReason,
    NotClaimed,
    ProcessedStatus,
    Row,
    RowFilter,
    TaskCount,
)
from celery_idempotent.errors import SchemaError
from celery_idempotent.stores.redis import admin, claims, producer, reading, recovering, transitions
from celery_idempotent.stores.redis.address import parse
from celery_idempotent.stores.redis.cluster import Cluster
from celery_idempotent.stores.redis.connection import ScriptSession, Server
from celery_idempotent.stores.redis.layout import VERSION, Layout
from celery_idempotent.stores.redis.scripts import Script
from celery_idempotent.stores.redis.sentinel import Sentinels

__all__ = ["RedisStore"]

_SERVERS: dict[str, type[Server]] = {"server": Server, "sentinel": Sentinels, "cluster": Cluster}

#: Messages that one round trip records.
_AT_ONCE = 500

# Whether it was made now, and its version.
_INIT = Script("""
local made = redis.call('SETNX', tag .. ':layout', ARGV[1])
return {made, redis.call('GET', tag .. ':layout')}
""")

_VERSION = Script("return {redis.call('GET', tag .. ':layout')}")


class RedisStore:
    """The queue log in Redis: on a server of its own, on whichever one Sentinels say is the master, or in a Redis Cluster.

    Implements :class:`~celery_idempotent.core.store.Store`. It has no transactions for its users: ``atomic=True`` and ``outbox(session)``
    need a SQL store. What it has recorded is as durable as the server is told to be, see "Keep the queue log in Redis".

    Safe between threads, greenlets and processes, and across forks: nothing is connected before the first verb, and each
    process connects for itself.

    Args:
        url: As for :func:`~celery_idempotent.stores.open_store`: ``redis://``, ``rediss://``, ``redis+socket://``,
            ``sentinel://`` or ``redis+cluster://``.
        table: What all keys of this log begin with, in braces; without braces of its own.

    Raises:
        ConfigurationError: The URL or the table is not valid.
    """

    def __init__(self, url: str, *, table: str = "queue_log") -> None:
        self._layout = Layout(table)
        self._table = table
        address = parse(url)
        self._server = _SERVERS[address.kind](address, self._layout, self._init)
        self._run = self._server.run

    def __repr__(self) -> str:
        return f"RedisStore({str(self._server)!r}, table={self._table!r})"

    # -- producer ------------------------------------------------------------------------------------------------------

    def record(self, message: NewMessage) -> Inserted | Duplicate:
        return self._run(lambda on, is_retry: producer.record(on, message, is_retry=is_retry))

    def record_all(self, messages: Sequence[NewMessage]) -> list[Inserted | Duplicate]:
        answers: list[Inserted | Duplicate] = []
        for first in range(0, len(messages), _AT_ONCE):
            some = messages[first : first + _AT_ONCE]
            answers += self._run(lambda on, is_retry, some=some: producer.record_all(on, some, is_retry=is_retry))  # type: ignore[misc]
        return answers

    def withdraw(self, key: MessageKey, *, task_id: str) -> bool:
        return self._run(lambda on, is_retry: producer.withdraw(on, key, task_id=task_id, is_retry=is_retry))

    def resubmit(self, row: Row, message: NewMessage) -> bool:
        return self._run(lambda on, is_retry: producer.resubmit(on, row, message, is_retry=is_retry))

    def republish(self, row: Row) -> bool:
        return self._run(lambda on, is_retry: producer.republish(on, row, is_retry=is_retry))

    def count_duplicate(self, key: MessageKey) -> None:
        self._run(lambda on, _: producer.count_duplicate(on, key))

    # -- consumer ------------------------------------------------------------------------------------------------------

    def claim(
        self,
        message: NewMessage,
        *,
        worker: str,
        lease: float,
        grace: float,
        adopt: Callable[[], NewMessage] | None = None,
    ) -> Claimed | NotClaimed:
        return self._run(
            lambda on, is_retry: claims.claim(
                on, message, worker=worker, lease=lease, grace=grace, adopt=adopt, is_retry=is_retry
            )
        )

    def take_over(self, row: Row, *, task_id: str, worker: str, lease: float, attempt: int) -> Claimed | None:
        return self._run(
            lambda on, is_retry: claims.take_over(
                on, row, task_id=task_id, worker=worker, lease=lease, attempt=attempt, is_retry=is_retry
            )
        )

    def renew(self, holders: Sequence[Holder], *, lease: float) -> list[Holder]:
        return self._run(lambda on, _: claims.renew(on, holders, lease=lease)) if holders else []

    def checkpoint(self, claim: Claim, *, result: bytes | None, lease: float | None = None) -> bool:
        return self._run(lambda on, _: transitions.checkpoint(on, claim, result=result, lease=lease))

    def complete(
        self, claim: Claim, *, result: bytes | None, note: NoResultReason | None = None, unique_for: float | None = None
    ) -> bool:
        return self._run(lambda on, _: transitions.complete(on, claim, result=result, note=note, unique_for=unique_for))

    def fail(self, holder: Holder, *, error: str, unique_for: float | None = None) -> bool:
        return self._run(
            lambda on, is_retry: transitions.fail(on, holder, error=error, unique_for=unique_for, is_retry=is_retry)
        )

    def retry(self, holder: Holder, message: NewMessage) -> bool:
        return self._run(lambda on, is_retry: transitions.retry(on, holder, message, is_retry=is_retry))

    def release(self, holder: Holder) -> bool:
        return self._run(lambda on, is_retry: transitions.release(on, holder, is_retry=is_retry))

    def expire(self, holder: Holder) -> bool:
        return self._run(lambda on, _: transitions.expire(on, holder))

    def abandon(self, row: Row, *, error: str, unique_for: float | None = None) -> bool:
        return self._run(
            lambda on, is_retry: transitions.abandon(on, row, error=error, unique_for=unique_for, is_retry=is_retry)
        )

    def cancel(self, key: MessageKey, *, task_id: str, error: str, unique_for: float | None = None) -> bool:
        return self._run(
            lambda on, is_retry: transitions.cancel(
                on, key, task_id=task_id, error=error, unique_for=unique_for, is_retry=is_retry
            )
        )

    def forbid(self, row: Row, *, error: str) -> bool:
        return self._run(lambda on, _: transitions.forbid(on, row, error=error))

    # -- recovery ------------------------------------------------------------------------------------------------------

    def lapsed(self, *, again_after: float, limit: int, tasks: Collection[str] | None = None) -> list[Row]:
        return self._run(lambda on, _: recovering.lapsed(on, again_after=again_after, limit=limit, tasks=tasks))

    def waiting(
        self,
        *,
        older_than: float,
        limit: int,
        before: Mapping[str, datetime] | None = None,
        tasks: Collection[str] | None = None,
    ) -> list[Row]:
        return self._run(
            lambda on, _: recovering.waiting(on, older_than=older_than, limit=limit, before=before, tasks=tasks)
        )

    def unsent(self, *, limit: int, tasks: Collection[str] | None = None) -> list[Row]:
        return self._run(lambda on, _: recovering.unsent(on, limit=limit, tasks=tasks))

    def relay(self, row: Row, *, lease: float) -> bool:
        return self._run(lambda on, _: recovering.relay(on, row, lease=lease))

    def relayed(self, keys: Sequence[MessageKey], *, published: bool) -> None:
        if keys:
            self._run(lambda on, _: recovering.relayed(on, keys, published=published))

    def not_published(self, key: MessageKey, *, token: int) -> None:
        self._run(lambda on, _: recovering.not_published(on, key, token=token))

    def purge(
        self,
        *,
        older_than: float,
        limit: int,
        failures_older_than: float | None = None,
        task_name: str | None = None,
        processed_status: ProcessedStatus | None = None,
    ) -> int:
        chosen = recovering.chosen_by(older_than, failures_older_than, task_name, processed_status)
        return self._run(lambda on, _: recovering.purge(on, chosen, limit=limit))

    def newest(self, *, limit: int) -> list[Row]:
        return self._run(lambda on, _: reading.newest(on, limit=limit))

    def find_all(self, keys: Collection[MessageKey]) -> list[Row]:
        return self._run(lambda on, _: reading.find_all(on, keys)) if keys else []

    # -- operators -----------------------------------------------------------------------------------------------------

    def find(self, key: MessageKey) -> Row | None:
        return self._run(lambda on, _: reading.find(on, key))

    def rows(self, where: RowFilter) -> Iterator[Row]:
        return iter(self._run(lambda on, _: reading.rows(on, where)))

    def counts(self) -> list[TaskCount]:
        return self._run(lambda on, _: reading.counts(on))

    def forget(self, row: Row) -> bool:
        return self._run(lambda on, is_retry: admin.forget(on, row, is_retry=is_retry))

    def purgeable(
        self,
        *,
        older_than: float,
        failures_older_than: float | None = None,
        task_name: str | None = None,
        processed_status: ProcessedStatus | None = None,
    ) -> int:
        chosen = recovering.chosen_by(older_than, failures_older_than, task_name, processed_status)
        return self._run(lambda on, _: admin.purgeable(on, chosen))

    def condition(self) -> LogHealth:
        return self._run(lambda on, _: admin.condition(on), prepared=False)

    def configuration(self) -> Mapping[str, str]:
        return self._run(lambda on, _: admin.configuration(on), prepared=False)

    # -- life cycle ----------------------------------------------------------------------------------------------------

    def init(self, *, before: Callable[[Change], None] | None = None) -> bool:
        if before is not None:
            for change in self.outstanding():
                before(change)
        return self._run(lambda on, _: self._init(on), prepared=False)

    def outstanding(self) -> list[Change]:
        return [] if self.inspect() else [Change(f"lay out {self._table}", alters=False)]

    def check(self) -> None:
        self._run(lambda on, _: self._init(on), prepared=False)

    def inspect(self) -> bool:
        ((version,),) = self._run(lambda on, _: on.call_each(_VERSION, [(0, ())]), prepared=False)
        self._verify(version)
        return version is not None

    def close(self) -> None:
        self._server.close()

    def _init(self, on: ScriptSession) -> bool:
        """Mark the layout as this version's, unless it is marked; whether that was done now."""
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
