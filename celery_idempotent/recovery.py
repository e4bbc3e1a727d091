"""Recovery: messages whose worker, broker or producer died are published again from their rows, and old rows are purged.

A step only publishes; every decision stays with the consumer that gets the message, and its claim absorbs a copy too many. Any
number of steps may run at once: each row is published by the one whose compare-and-set of ``published_at`` succeeds.

A pending row is never aged out by time alone, since a backlog is not a loss. It is presumed lost once it was overtaken: a message that
was recorded ``idempotent_lost_after`` later on its queue has been claimed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Protocol

from kombu.exceptions import OperationalError

from celery_idempotent.consumer import ABANDONED
from celery_idempotent.forks import no_fork
from celery_idempotent.records import MessageKey, Row, Status
from celery_idempotent.serialization import UndecodableError, decode_message
from celery_idempotent.wire import Marker

if TYPE_CHECKING:
    from celery_idempotent.queue_log import QueueLog
    from celery_idempotent.store import Store
    from celery_idempotent.task import IdempotentTask

__all__ = ["Recovered", "Recovery"]

logger = logging.getLogger("celery_idempotent")

#: Rows that one statement reads or deletes.
BATCH = 200

_ALL = float("inf")

#: The longest pause between two publications of one message that nobody takes.
_LONGEST_PAUSE = timedelta(days=1)

#: Seconds that a step spends on purging before it leaves the rest to the next.
_PURGE_FOR = 5.0

#: How many messages that run, and how many that ended, are looked at for what they have overtaken.
_NEWEST = 1000


class _Read(Protocol):
    """A verb of the store that lists rows."""

    def __call__(self, *, limit: int) -> list[Row]: ...


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a step did.

    Attributes:
        taken_back: Messages published again because their owner's lease ran out.
        relayed: Messages published that were recorded and never handed to the broker.
        lost: Messages published again because the broker is presumed to have lost them.
        purged: Rows deleted.
    """

    taken_back: int = 0
    relayed: int = 0
    lost: int = 0
    purged: int = 0

    def __add__(self, other: Recovered) -> Recovered:
        return Recovered(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def more(self) -> bool:
        """Whether there may be more to do: something was done up to its limit."""
        published = max(self.taken_back, self.relayed, self.lost)
        return published >= BATCH or (self.purged > 0 and self.purged % BATCH == 0)


class Recovery:
    """Recovers the messages of one queue log.

    Args:
        queue_log: The queue log; its app publishes.
    """

    def __init__(self, queue_log: QueueLog) -> None:
        self._queue_log = queue_log
        self._latest: dict[str | None, MessageKey] = {}

    @property
    def _store(self) -> Store:
        return self._queue_log.store

    def saw(self, queue: str | None, key: MessageKey) -> None:
        """A message of this queue has just reached a worker: by its row the next step tells what it has overtaken."""
        self._latest[queue] = key

    def step(self) -> Recovered:
        """Recover once.

        Raises:
            StoreError: The store gave no answer, or its schema is not of this version.
            kombu.exceptions.OperationalError: The broker did not take a message; its row waits for the next step.
        """
        lost_after = self._queue_log.settings.lost_after
        return Recovered(
            taken_back=self._publish_due(
                partial(self._store.lapsed, again_after=lost_after),
                due=lambda row: _has_paused(row, since=row.lease_expires_at),
            ),
            relayed=self._publish_due(self._store.unsent),
            lost=self._publish_overtaken(lost_after),
            purged=self.purge(),
        )

    def steps(
        self, *, lost_after: float | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[Recovered]:
        """Step until nothing more is due: for a process that does nothing else.

        It has not seen any delivery, so that it looks in the table for what runs or ran lately, and may have overtaken others.

        Args:
            lost_after: As for :meth:`publish_waiting`, which comes last then; ``None`` leaves it out.
            stopped: Asked after each batch whether the rest is to be left.

        Raises:
            StoreError: As for :meth:`step`.
            kombu.exceptions.OperationalError: As for :meth:`step`.
        """
        more = True
        while more and not stopped():
            self._see_what_ran()
            done = self.step()
            yield done
            more = done.more
        if lost_after is not None and not stopped():
            yield Recovered(lost=self.publish_waiting(lost_after, stopped=stopped))

    def publish_waiting(self, lost_after: float, *, stopped: Callable[[], bool] = lambda: False) -> int:
        """Publish every pending message again that has waited longer, overtaken or not: for a broker that was emptied.

        Args:
            lost_after: Seconds; a message that the broker still has gets a copy, which its claim absorbs.
            stopped: Asked after each batch whether the rest is to be left.

        Returns:
            How many were published.

        Raises:
            StoreError: As for :meth:`step`.
            kombu.exceptions.OperationalError: As for :meth:`step`.
        """
        return sum(
            self._publish_due(read, at_most=_ALL, stopped=stopped)
            for read in (self._store.unsent, partial(self._store.waiting, older_than=lost_after))
        )

    def purge(self, *, older_than: float | None = None, within: float | None = None) -> int:
        """Delete rows of messages that are done, in small batches; their ids are free again.

        Args:
            older_than: Seconds since they were done; ``None`` for ``idempotent_retention``.
            within: Seconds after which the rest is left to the next time; ``None`` for a step's share of them.

        Returns:
            How many were deleted.

        Raises:
            StoreError: As for :meth:`step`.
        """
        if older_than is None:
            older_than = self._queue_log.settings.retention
        purged, deadline = 0, time.monotonic() + (_PURGE_FOR if within is None else within)
        while time.monotonic() < deadline:
            with no_fork():
                deleted = self._store.purge(older_than=older_than, limit=BATCH)
            purged += deleted
            if deleted < BATCH:
                break
        return purged

    # -- publishing ----------------------------------------------------------------------------------------------------

    def _see_what_ran(self) -> None:
        """The newest message of each queue that ran or runs stands for the deliveries that other processes have seen."""
        self._latest.update({row.queue: row.key for row in reversed(self._store.newest(limit=_NEWEST))})

    def _publish_overtaken(self, lost_after: float) -> int:
        published = 0
        for key in list(self._latest.values()):
            with no_fork():
                latest = self._store.find(key)
            # Of a message whose queue is not known nobody knows what it has overtaken.
            if latest is None or latest.worker is None or latest.queue is None:
                continue
            overtaken = partial(
                self._store.waiting,
                older_than=lost_after,
                queue=latest.queue,
                before=latest.created_timestamp - timedelta(seconds=lost_after),
            )
            published += self._publish_due(
                # A retry waits since it was due, which no message of its own that it had before has to do with.
                overtaken,
                due=lambda row: _has_paused(row, since=row.available_at or row.created_timestamp),
            )
        return published

    def _publish_due(
        self,
        read: _Read,
        *,
        due: Callable[[Row], bool] = lambda _: True,
        at_most: float = BATCH,
        stopped: Callable[[], bool] = lambda: False,
    ) -> int:
        """Publish what is due among the rows that a verb lists; how many were.

        Rows that pause, that no task of this app is for or that cannot be published stay where they are, first in the list: they
        are read past, lest they keep all others from being recovered.
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
            return self._publish_row(row)

    def _publish_row(self, row: Row) -> bool:
        task = self._queue_log.app.tasks.get(row.key.task_name)
        if task is None or not hasattr(type(task), "idempotency"):
            return False  # another app's, on the same store: its own workers recover it
        publish = self._publication(task, row)
        if publish is None or not self._store.republish(row):
            return False
        name = f"{row.key.task_name}[{row.key.message_id}]"
        try:
            publish()
        except BaseException as error:
            self._store.not_published(row.key, token=row.token)
            if isinstance(error, OperationalError) or not isinstance(error, Exception):
                raise  # the broker takes none
            logger.exception("%s could not be published again", name)
            return False
        logger.warning("%s is published %s: it was %s", name, "again" if row.published_at else "at last", row.status)
        return True

    def _publication(self, task: IdempotentTask, row: Row) -> Callable[[], object] | None:
        """How to publish a row's message; ``None`` when it cannot be, which ends a message without an owner."""
        try:
            call = decode_message(self._queue_log.app, row.message)
        except UndecodableError as error:
            logger.error("%s[%s] cannot be published again: %s", row.key.task_name, row.key.message_id, error)
            if row.status is Status.PROCESSING:
                self._store.abandon(row, error=f"{ABANDONED}; {error}", unique_for=task.idempotency.unique_for)
            return None
        args, kwargs, options = call
        # A copy's own row is known by its task id; the message in it says which message it is a copy of.
        message_id = options.get("message_id") or row.key.message_id
        copied = message_id != row.key.message_id
        marker = Marker(message_id, row.key.task_name, row.task_id, row.fingerprint, copied=copied)
        sent = Marker.read(options.get("headers"))
        if sent is not None and sent.belongs_to(
            row.key.task_name, row.task_id
        ):  # a retry, which says whose calls it makes
            marker = replace(marker, first=sent.first, lost=sent.lost)
        # What the row knows better, and what was true of one delivery only.
        replaced = ("eta", "task_id", "message_id", "headers", "retries", "redelivered", "is_eager", "ignore_result")
        kept = {name: value for name, value in options.items() if name not in replaced}
        if row.status is Status.PENDING and row.available_in > 0:
            # To quorum queues Celery publishes whole seconds only, and raises ValueError for less than one.
            kept["countdown"] = max(row.available_in, 1.0)
        # Celery listens for the result of what it publishes, which nobody in this process waits for, and which would cost a
        # subscription each, and much patience while the result backend is down. Told to ignore it, it does not; the header
        # tells the consumer how it is.
        headers = {**(options.get("headers") or {}), "ignore_result": options.get("ignore_result", task.ignore_result)}
        return partial(
            task.publish,
            args,
            kwargs,
            task_id=row.task_id,
            message_id=message_id,
            headers=marker.write(headers),
            retries=row.attempt,
            ignore_result=True,
            **kept,
        )


def _has_paused(row: Row, *, since: datetime | None) -> bool:
    """Whether it is time to publish a row once more: each pause is as long as all before it together."""
    if row.published_at is None or since is None or row.published_at <= since:
        return True
    return row.read_at - row.published_at >= min(row.published_at - since, _LONGEST_PAUSE)
