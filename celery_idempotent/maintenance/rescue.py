"""Rescue: publish messages again, from their rows, if their worker died or their broker lost them.

Rescue only publishes. The consumer that gets the message decides, and its claim absorbs an extra copy. Any number of passes may run at
once: each row is published by the pass whose compare-and-set of ``published_at`` succeeds.

Time alone never makes a pending row count as lost, since a backlog is not a loss. It is presumed lost after it was overtaken: a message
recorded ``idempotent_lost_after`` later on its queue has been claimed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from celery.utils.time import rate

from celery_idempotent.core.fork_lock import no_fork
from celery_idempotent.core.records import MessageKey, Row
from celery_idempotent.core.store import BATCH
from celery_idempotent.producer.recorded import own_tasks, republish
from celery_idempotent.producer.relay import relay
from celery_idempotent.producer.unrecorded import is_unrecorded

if TYPE_CHECKING:
    from celery_idempotent.core.store import Store
    from celery_idempotent.queue_log import QueueLog

__all__ = ["Rescue"]

#: The longest pause between two publications of a message that no worker claims.
_LONGEST_PAUSE = timedelta(days=1)

#: For how many queues or routing keys the last message is remembered; the oldest are dropped.
_QUEUES = 500

#: How many running and how many ended messages are read to find out which others they have overtaken.
_NEWEST = 1000


class _Read(Protocol):
    """A verb of the store that lists rows."""

    def __call__(self, *, limit: int) -> list[Row]: ...


class Rescue:
    """Publish messages again if their worker died or their broker lost them.

    Args:
        queue_log: The queue log; its app publishes.
    """

    def __init__(self, queue_log: QueueLog) -> None:
        self._queue_log = queue_log
        #: The last message by queue, and by task if that has a rate limit; in the order in which they were seen.
        self._latest: dict[tuple[str | None, str | None], MessageKey] = {}

    @classmethod
    def of(cls, queue_log: QueueLog) -> Rescue:
        """Return the queue log's one rescue in this process, which knows what the worker has received."""
        return queue_log.part(cls, lambda: cls(queue_log))

    @property
    def _store(self) -> Store:
        return self._queue_log.store

    def saw(self, queue: str | None, key: MessageKey) -> None:
        """Note that a worker has received a message of this queue; the next pass reads from its row what it has overtaken."""
        of = queue, key.task_name if self._held_by_rate(key.task_name) else None
        self._latest.pop(of, None)
        self._latest[of] = key
        if len(self._latest) > _QUEUES:
            self._latest.pop(next(iter(self._latest)), None)

    def see_what_ran(self) -> None:
        """Note the newest message of each queue that ran or runs, in place of deliveries that other processes have seen."""
        for row in reversed(self._store.newest(limit=_NEWEST)):
            self.saw(row.queue, row.key)

    # -- claims whose lease ran out ------------------------------------------------------------------------------------

    def publish_lapsed(self) -> int:
        """Publish messages again whose owner's lease ran out; return how many."""
        return self._publish_due(partial(self._store.lapsed, **self._of_lapsed()), due=_lapsed_and_paused)

    def lapsed(self, at_most: int) -> list[Row]:
        """Return what :meth:`publish_lapsed` would publish, from the first ``at_most`` rows."""
        return [row for row in self._store.lapsed(**self._of_lapsed(), limit=at_most) if _lapsed_and_paused(row)]

    def _of_lapsed(self) -> dict[str, Any]:
        lost_after = self._queue_log.settings.lost_after
        return {"again_after": lost_after, "tasks": self._guarded_tasks(), "doubted": False}

    # -- the guard is off ----------------------------------------------------------------------------------------------

    def doubt_turned_off(self) -> None:
        """Note of messages whose task is turned off that they may run, or have run, without a trace; then nothing publishes them by itself.

        Raises:
            StoreError: The store did not answer, or its schema has another version.
        """
        guarded = set(self._guarded_tasks())
        tasks = [name for name in own_tasks(self._queue_log) if name not in guarded]
        if not tasks:
            return
        for read in (partial(self._store.waiting, older_than=0.0), partial(self._store.lapsed, again_after=0.0)):
            seen = set[MessageKey]()
            while True:
                with no_fork():
                    rows = read(limit=BATCH, tasks=tasks, doubted=False)
                fresh = [row.key for row in rows if row.key not in seen]
                if not fresh:
                    break
                with no_fork():
                    self._store.doubt(fresh)
                seen.update(fresh)

    # -- messages that the broker lost ---------------------------------------------------------------------------------

    def publish_overtaken(self) -> int:
        """Publish messages again that were overtaken on their queues; return how many."""
        return sum(self._publish_due(read, due=_overtaken_and_paused) for read in self._overtaken())

    def overtaken(self, at_most: int) -> list[Row]:
        """Return what :meth:`publish_overtaken` would publish, from the first ``at_most`` rows."""
        return [row for read in self._overtaken() for row in read(limit=at_most) if _overtaken_and_paused(row)]

    def publish_waiting(
        self, lost_after: float, *, task: str | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> int:
        """Publish all pending messages again that have waited longer, overtaken or not: for a broker that was emptied.

        Args:
            lost_after: Seconds. A message that the broker still has gets a copy, which its claim absorbs.
            task: Only messages of this task. Messages that waited while its guard was off are published only if it is named.
            stopped: Called after each batch; stop if it returns true.

        Returns:
            How many were published.

        Raises:
            StoreError: The store did not answer, or its schema has another version.
            kombu.exceptions.OperationalError: The broker did not take a message; its row waits for the next pass.
        """
        relayed = relay(self._queue_log, at_most=math.inf, stopped=stopped).published
        return relayed + sum(
            self._publish_due(read, at_most=math.inf, stopped=stopped) for read in self._waiting(lost_after, task)
        )

    def waiting(self, lost_after: float, *, task: str | None = None, at_most: int) -> list[Row]:
        """Return what :meth:`publish_waiting` would publish, from the first ``at_most`` rows, without the rows that it relays."""
        return [row for read in self._waiting(lost_after, task) for row in read(limit=at_most)]

    def _waiting(self, lost_after: float, task: str | None) -> list[_Read]:
        if task is None:
            tasks = self._guarded_tasks()
            return [partial(self._store.waiting, older_than=lost_after, tasks=tasks, doubted=False)]
        tasks = [name for name in own_tasks(self._queue_log) if name == task]
        return [
            partial(self._store.waiting, older_than=lost_after, tasks=tasks),
            partial(self._store.lapsed, again_after=lost_after, tasks=tasks),
        ]

    def _overtaken(self) -> list[_Read]:
        """Return functions that read overtaken rows: one for each task with a rate limit, and one for all others.

        Workers hold messages of a rate-limited task back while others pass. So only messages of the same task count, and only if they
        were recorded later by more than the time for which a worker holds them back.
        """
        lost_after = self._queue_log.settings.lost_after
        with no_fork():
            rows = self._store.find_all(set(self._latest.values()))
        before: dict[str | None, dict[str, datetime]] = {}
        for row in rows:
            held = self._held_by_rate(row.key.task_name)
            # Without its queue, it is unknown which messages it has overtaken.
            if row.worker is None or row.queue is None or held == math.inf:
                continue
            of = before.setdefault(row.key.task_name if held else None, {})
            moment = row.created_timestamp - timedelta(seconds=lost_after + held)
            of[row.queue] = max(moment, of.get(row.queue, moment))
        guarded = self._guarded_tasks()
        unlimited = [name for name in guarded if not self._held_by_rate(name)]
        reads: list[_Read] = []
        for task, moments in before.items():
            tasks = unlimited if task is None else [name for name in guarded if name == task]
            if tasks:
                of_tasks = partial(self._store.waiting, tasks=tasks, doubted=False)
                reads.append(partial(of_tasks, older_than=lost_after, before=moments))
        return reads

    def _held_by_rate(self, task_name: str) -> float:
        """Return the seconds for which a worker holds a task's message back at most, because of its rate limit; 0 for no limit."""
        app = self._queue_log.app
        limit = getattr(app.tasks.get(task_name), "rate_limit", None)
        if not limit or app.conf.worker_disable_rate_limits:
            return 0.0
        per_second = rate(limit)
        if not per_second:
            return 0.0
        prefetched = app.conf.worker_prefetch_multiplier * (app.conf.worker_concurrency or os.cpu_count() or 1)
        return prefetched / per_second if prefetched else math.inf

    def _guarded_tasks(self) -> list[str]:
        """Return the tasks to rescue: those that are not turned off, since messages of others run without the guard."""
        tasks = self._queue_log.app.tasks
        return [name for name in own_tasks(self._queue_log) if not is_unrecorded(tasks[name])]

    # -- publishing ----------------------------------------------------------------------------------------------------

    def _publish_due(
        self,
        read: _Read,
        *,
        due: Callable[[Row], bool] = lambda _: True,
        at_most: float = BATCH,
        stopped: Callable[[], bool] = lambda: False,
    ) -> int:
        """Publish the due rows among those that ``read`` lists; return how many.

        Rows that pause, belong to no task of this app or cannot be published stay first in the list. Read past them, so that they do
        not block the others.
        """
        published, seen, left = 0, set[MessageKey](), 0
        while published < at_most and not stopped():
            limit = BATCH + 2 * left
            with no_fork():
                rows = read(limit=limit)
            fresh = [row for row in rows if row.key not in seen]
            seen.update(row.key for row in fresh)
            now = sum(due(row) and self._publish(row) for row in fresh)
            published, left = published + now, left + len(fresh) - now
            if not fresh or len(rows) < limit:
                break
        return published

    def _publish(self, row: Row) -> bool:
        with no_fork():
            return republish(self._queue_log, row)


def _lapsed_and_paused(row: Row) -> bool:
    return _has_paused(row, since=row.lease_expires_at)


def _overtaken_and_paused(row: Row) -> bool:
    # A retry's wait starts when it became due. Earlier publications don't count.
    return _has_paused(row, since=row.available_at or row.created_timestamp)


def _has_paused(row: Row, *, since: datetime | None) -> bool:
    """Return whether a row's pause is over. Each pause is as long as all before it together, up to a day."""
    if row.published_at is None or since is None or row.published_at <= since:
        return True
    return row.read_at - row.published_at >= min(row.published_at - since, _LONGEST_PAUSE)
