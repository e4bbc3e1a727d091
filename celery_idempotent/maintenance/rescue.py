"""Recovery: messages whose worker, broker or producer died are published again from their rows, and old rows are purged.

A step only publishes; every decision stays with the consumer that gets the message, and its claim absorbs a copy too many. Any
number of steps may run at once: each row is published by the one whose compare-and-set of ``published_at`` succeeds.

A pending row is never aged out by time alone, since a backlog is not a loss. It is presumed lost once it was overtaken: a message that
was recorded ``idempotent_lost_after`` later on its queue has been claimed.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from celery.utils.time import rate
from kombu.exceptions import OperationalError

from celery_idempotent.core.fork_lock import no_fork
from celery_idempotent.core.records import MessageKey, NewMessage, ProcessedStatus, Row, Status
from celery_idempotent.hooks import OutcomeKind, reason_of
from celery_idempotent.message.canvas_ids import is_guarded
from celery_idempotent.message.header import Marker
from celery_idempotent.message.identity import FANOUT
from celery_idempotent.message.serialization import UndecodableError, decode_message, trace_of
from celery_idempotent.producer.outbox import PUBLISH_WITHIN
from celery_idempotent.producer.publisher import publish
from celery_idempotent.producer.send import end_broadcast
from celery_idempotent.worker.admission import ABANDONED

if TYPE_CHECKING:
    from celery_idempotent.core.store import Store
    from celery_idempotent.producer.guarded import Guarded
    from celery_idempotent.queue_log import QueueLog

__all__ = ["Due", "Recovered", "Recovery", "Relayed"]

logger = logging.getLogger("celery_idempotent")

#: Rows that one statement reads or deletes.
BATCH = 200

#: Seconds for which a relay keeps others from publishing what it publishes; it ends a batch in half of that.
RELAY_LEASE = 10.0

#: Seconds for which a process that does nothing else waits, in all, for what others are publishing, which may be left by the dead; and
#: between two looks at it.
_IN_FLIGHT = max(RELAY_LEASE, PUBLISH_WITHIN) + 1.0
_LOOK_EVERY = 0.2

#: Batches of what was committed and not published that a step publishes; of everything else it is one.
_RELAYED = 25

_ALL = float("inf")

#: The longest pause between two publications of one message that nobody takes.
_LONGEST_PAUSE = timedelta(days=1)

#: Seconds that a step spends on purging before it leaves the rest to the next.
_PURGE_FOR = 5.0

#: Of how many queues, or routing keys, the last message is kept in mind: those seen last.
_QUEUES = 500

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


@dataclass(frozen=True, slots=True)
class Due:
    """What would be done if everything was recovered now.

    Attributes:
        taken_back: Rows whose owner's lease ran out.
        relayed: Rows that were recorded and never handed to the broker, and that nobody is publishing.
        lost: Rows that the broker is presumed to have lost.
        purged: How many rows would be deleted.
    """

    taken_back: tuple[Row, ...] = ()
    relayed: tuple[Row, ...] = ()
    lost: tuple[Row, ...] = ()
    purged: int = 0


@dataclass(frozen=True, slots=True)
class Relayed:
    """What a relay did.

    Attributes:
        published: How many messages it published.
        in_flight: Seconds for which the rest is being published by others; 0 when there is no rest.
    """

    published: int
    in_flight: float = 0.0


class Recovery:
    """Recovers the messages of one queue log.

    Args:
        queue_log: The queue log; its app publishes.
    """

    def __init__(self, queue_log: QueueLog) -> None:
        self._queue_log = queue_log
        #: By queue, and by task where a rate limit keeps it waiting; those seen last come last.
        self._latest: dict[tuple[str | None, str | None], MessageKey] = {}

    @property
    def _store(self) -> Store:
        return self._queue_log.store

    def saw(self, queue: str | None, key: MessageKey) -> None:
        """A message of this queue has just reached a worker: by its row the next step tells what it has overtaken."""
        of = queue, key.task_name if self._held_by_rate(key.task_name) else None
        self._latest.pop(of, None)
        self._latest[of] = key
        if len(self._latest) > _QUEUES:
            self._latest.pop(next(iter(self._latest)), None)

    def step(self) -> Recovered:
        """Recover once.

        Raises:
            StoreError: The store gave no answer, or its schema is not of this version.
            kombu.exceptions.OperationalError: The broker did not take a message; its row waits for the next step.
        """
        lost_after = self._queue_log.settings.lost_after
        return Recovered(
            taken_back=self._publish_due(
                partial(self._store.lapsed, again_after=lost_after, tasks=self._tasks()), due=_lapsed_and_paused
            ),
            relayed=self.relay(at_most=_RELAYED * BATCH).published,
            lost=self._publish_overtaken(lost_after),
            purged=self.purge(),
        )

    def steps(
        self,
        *,
        lost_after: float | None = None,
        task: str | None = None,
        in_flight: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Recovered]:
        """Step until nothing more is due: for a process that does nothing else.

        It has not seen any delivery, so that it looks in the table for what runs or ran lately, and may have overtaken others.

        Args:
            lost_after: As for :meth:`publish_waiting`, which comes last then; ``None`` leaves it out.
            task: As for :meth:`publish_waiting`.
            in_flight: Whether to wait some seconds for what others are publishing just then, since they may be dead.
            stopped: Asked after each batch whether the rest is to be left.

        Raises:
            StoreError: As for :meth:`step`.
            kombu.exceptions.OperationalError: As for :meth:`step`.
        """
        more, patience = True, time.monotonic() + _IN_FLIGHT
        while more and not stopped():
            self._see_what_ran()
            done = self.step()
            yield done
            more = done.more
            while in_flight and not more and not stopped() and time.monotonic() < patience:
                rest = self.relay(at_most=_ALL, stopped=stopped)
                yield Recovered(relayed=rest.published)
                if not rest.in_flight:
                    break
                time.sleep(min(rest.in_flight, _LOOK_EVERY))
        if lost_after is not None and not stopped():
            yield Recovered(lost=self.publish_waiting(lost_after, task=task, stopped=stopped))

    def due(self, *, lost_after: float | None = None, task: str | None = None, at_most: int = 1000) -> Due:
        """What :meth:`steps` would do, as far as that can be seen: nothing is published, changed or deleted.

        Args:
            lost_after: As for :meth:`steps`.
            task: As for :meth:`steps`.
            at_most: Rows of each kind that are looked at.

        Raises:
            StoreError: As for :meth:`step`.
        """
        self._see_what_ran()
        settings, store = self._queue_log.settings, self._store
        lapsed = store.lapsed(again_after=settings.lost_after, limit=at_most, tasks=self._tasks())
        lost = {
            row.key: row
            for read in self._overtaken(settings.lost_after)
            for row in read(limit=at_most)
            if _overtaken_and_paused(row)
        }
        if lost_after is not None:
            waiting = store.waiting(older_than=lost_after, limit=at_most, tasks=self._recorded_tasks(task))
            lost.update((row.key, row) for row in waiting)
        return Due(
            taken_back=tuple(row for row in lapsed if _lapsed_and_paused(row) and self._is_ours(row)),
            relayed=tuple(
                row
                for row in store.unsent(limit=at_most, tasks=self._tasks())
                if row.lease_left <= 0 and self._is_ours(row)
            ),
            lost=tuple(filter(self._is_ours, lost.values())),
            purged=self.purgeable(),
        )

    def _is_ours(self, row: Row) -> bool:
        """Whether this app can publish a row's message."""
        try:
            decode_message(self._queue_log.app, self._whole(row).message)
        except UndecodableError:
            return False
        return True

    def _tasks(self) -> list[str]:
        """The guarded tasks of this app: what others have in the same store, their own workers recover."""
        return [name for name, task in self._queue_log.app.tasks.items() if is_guarded(task)]

    def _recorded_tasks(self, task: str | None = None) -> list[str]:
        """Of these, those that are not turned off: messages of one that is may have run without the guard, and are left to be named."""
        tasks = self._queue_log.app.tasks
        return [
            name for name in self._tasks() if (tasks[name].idempotency.idempotent if task is None else name == task)
        ]

    def _whole(self, row: Row) -> Row:
        """A row with its message, which is not listed if it is large."""
        return row if row.message is not None else self._store.find(row.key) or row

    def relay(self, *, at_most: float = BATCH, stopped: Callable[[], bool] = lambda: False) -> Relayed:
        """Publish what was committed and never handed to the broker, in the order in which it was recorded.

        One relay at a time publishes, by a lease on the oldest row, or the order would be lost; it leaves alone what its recorder is
        publishing, and all that comes behind that. A relay that dies in the midst has its messages published again, which their
        claims absorb.

        Args:
            at_most: Messages, or some more.
            stopped: Asked after each batch whether the rest is to be left.

        Raises:
            StoreError: As for :meth:`step`.
            kombu.exceptions.OperationalError: As for :meth:`step`.
        """
        published, left, tasks = 0, set[MessageKey](), self._tasks()
        while published < at_most and not stopped():
            # Read past what cannot be published, lest it keeps all others from being relayed.
            limit = BATCH + 2 * len(left)
            with no_fork():
                rows = self._store.unsent(limit=limit, tasks=tasks)
            ours: list[tuple[Row, Callable[[], object]]] = []
            for row in rows:
                if row.key not in left:
                    publication = self._publication(row)
                    if publication is None:
                        left.add(row.key)
                    else:
                        ours.append((row, publication))
            if not ours:
                if len(rows) < limit:
                    break
                continue
            head, _ = ours[0]
            if head.lease_left > 0:
                return Relayed(published, head.lease_left)
            with no_fork():
                taken = self._store.relay(head, lease=RELAY_LEASE)
            if taken:  # or somebody else was first: look who it is
                published += self._relay(ours, left)
        return Relayed(published)

    def _relay(self, ours: list[tuple[Row, Callable[[], object]]], left: set[MessageKey]) -> int:
        """Publish rows in their order, the first of which is taken; how many were. Those that cannot be are among the ``left`` then."""
        deadline = time.monotonic() + RELAY_LEASE / 2
        head = ours[0][0].key
        done: list[MessageKey] = []
        try:
            for row, publish in ours:
                if (row.lease_left > 0 and row.key != head) or time.monotonic() > deadline:
                    break
                with no_fork():
                    published = self._published(row, publish)
                if published:
                    done.append(row.key)
                else:
                    left.add(row.key)
        finally:
            with no_fork():
                self._store.relayed(done, published=True)
                if head not in done:
                    self._store.relayed([head], published=False)
        return len(done)

    def publish_waiting(
        self, lost_after: float, *, task: str | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> int:
        """Publish every pending message again that has waited longer, overtaken or not: for a broker that was emptied.

        Args:
            lost_after: Seconds; a message that the broker still has gets a copy, which its claim absorbs.
            task: Only messages of this task. Those of a task that is turned off are only published if it is named.
            stopped: Asked after each batch whether the rest is to be left.

        Returns:
            How many were published.

        Raises:
            StoreError: As for :meth:`step`.
            kombu.exceptions.OperationalError: As for :meth:`step`.
        """
        relayed = self.relay(at_most=_ALL, stopped=stopped).published
        waiting = partial(self._store.waiting, older_than=lost_after, tasks=self._recorded_tasks(task))
        return relayed + self._publish_due(waiting, at_most=_ALL, stopped=stopped)

    def purge(
        self,
        *,
        older_than: float | None = None,
        task_name: str | None = None,
        processed_status: ProcessedStatus | None = None,
        within: float | None = None,
    ) -> int:
        """Delete rows of messages that are done, in small batches; their ids are free again.

        Args:
            older_than: Seconds since they were done; ``None`` for ``idempotent_retention``.
            task_name: Only rows of this task; a pattern with ``*`` and ``?``.
            processed_status: Only rows that ended so. Unless it is ``FAILURE``, failures that can be requeued are kept for
                ``idempotent_failure_retention``.
            within: Seconds after which the rest is left to the next time; ``None`` for a step's share of them.

        Returns:
            How many were deleted.

        Raises:
            StoreError: As for :meth:`step`.
        """
        chosen = self._old(older_than, task_name, processed_status)
        purged, deadline = 0, time.monotonic() + (_PURGE_FOR if within is None else within)
        while time.monotonic() < deadline:
            with no_fork():
                deleted = self._store.purge(**chosen, limit=BATCH)
                if deleted and self._queue_log.outcomes is not None:
                    self._queue_log.outcomes.tell(OutcomeKind.PURGED, count=deleted)
            purged += deleted
            if deleted < BATCH:
                break
        return purged

    def purgeable(
        self,
        *,
        older_than: float | None = None,
        task_name: str | None = None,
        processed_status: ProcessedStatus | None = None,
    ) -> int:
        """How many rows :meth:`purge` would delete now.

        Raises:
            StoreError: As for :meth:`step`.
        """
        return self._store.purgeable(**self._old(older_than, task_name, processed_status))

    def _old(
        self, older_than: float | None, task_name: str | None, processed_status: ProcessedStatus | None
    ) -> dict[str, Any]:
        settings = self._queue_log.settings
        told = older_than is not None and processed_status is ProcessedStatus.FAILURE
        return {
            "older_than": settings.retention if older_than is None else older_than,
            "failures_older_than": None if told else settings.failure_retention,
            "task_name": task_name,
            "processed_status": processed_status,
        }

    # -- publishing ----------------------------------------------------------------------------------------------------

    def _see_what_ran(self) -> None:
        """The newest message of each queue that ran or runs stands for the deliveries that other processes have seen."""
        for row in reversed(self._store.newest(limit=_NEWEST)):
            self.saw(row.queue, row.key)

    def _publish_overtaken(self, lost_after: float) -> int:
        return sum(self._publish_due(read, due=_overtaken_and_paused) for read in self._overtaken(lost_after))

    def _overtaken(self, lost_after: float) -> list[_Read]:
        """What reads the rows that have been overtaken on their queues: those of most tasks, and of each that has a rate limit.

        Workers keep messages of such a task back while others pass: only what it overtakes itself counts, by more than what a worker keeps
        back of it.
        """
        with no_fork():
            rows = self._store.find_all(set(self._latest.values()))
        before: dict[str | None, dict[str, datetime]] = {}
        for row in rows:
            held = self._held_by_rate(row.key.task_name)
            # Of a message whose queue is not known nobody knows what it has overtaken.
            if row.worker is None or row.queue is None or held == math.inf:
                continue
            of = before.setdefault(row.key.task_name if held else None, {})
            moment = row.created_timestamp - timedelta(seconds=lost_after + held)
            of[row.queue] = max(moment, of.get(row.queue, moment))
        recorded = self._recorded_tasks()
        unlimited = [name for name in recorded if not self._held_by_rate(name)]
        reads: list[_Read] = []
        for task, moments in before.items():
            tasks = unlimited if task is None else [name for name in recorded if name == task]
            if tasks:
                reads.append(partial(self._store.waiting, older_than=lost_after, before=moments, tasks=tasks))
        return reads

    def _held_by_rate(self, task_name: str) -> float:
        """Seconds for which a worker keeps a message of a task back for its rate limit, at most; 0 for none."""
        app = self._queue_log.app
        limit = getattr(app.tasks.get(task_name), "rate_limit", None)
        if not limit or app.conf.worker_disable_rate_limits:
            return 0.0
        per_second = rate(limit)
        if not per_second:
            return 0.0
        prefetched = app.conf.worker_prefetch_multiplier * (app.conf.worker_concurrency or os.cpu_count() or 1)
        return prefetched / per_second if prefetched else math.inf

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
        publish = self._publication(row)
        if publish is None or not self._store.republish(row):
            return False
        published = False
        try:
            published = self._published(row, publish)
        finally:
            if not published:
                self._store.not_published(row.key, token=row.token)
        return published

    def _published(self, row: Row, publish: Callable[[], object]) -> bool:
        """Hand a row's message to the broker. Returns whether that could be done with this one.

        Raises:
            kombu.exceptions.OperationalError: The broker takes none.
        """
        name = f"{row.key.task_name}[{row.key.message_id}]"
        try:
            publish()
        except OperationalError:
            raise
        except Exception:
            logger.exception("%s could not be published again", name)
            return False
        logger.warning("%s is published %s: it was %s", name, "again" if row.published_at else "at last", row.status)
        if row.status is Status.PROCESSING:
            self._tell(OutcomeKind.RECOVERED, row, "taken_back")
        else:
            self._tell(OutcomeKind.RECOVERED, row, "lost" if row.published_at else "relayed")
        return True

    def _publication(self, row: Row) -> Callable[[], object] | None:
        """How to publish a row's message; ``None`` when it cannot be, which ends a message without an owner."""
        task = self._queue_log.app.tasks[row.key.task_name]
        if row.forbidden:
            if self._store.abandon(row, error=row.error or ABANDONED, unique_for=task.idempotency.unique_for):
                self._tell(OutcomeKind.CANCELLED, row, reason_of(row.error or ABANDONED))
            return None
        if row.message is None:
            # Not listed, as it may be large: it is read when its turn has come.
            return partial(self._publish_whole, row)
        return self._publication_of(row, row)

    def _publish_whole(self, row: Row) -> None:
        whole = self._store.find(row.key)
        publish = None if whole is None else self._publication_of(row, whole)
        if publish is None:
            raise UndecodableError("it was left as it is")
        publish()

    def _publication_of(self, row: Row, whole: Row) -> Callable[[], object] | None:
        task = self._queue_log.app.tasks[row.key.task_name]
        try:
            args, kwargs, options = decode_message(self._queue_log.app, whole.message)
        except UndecodableError as error:
            logger.error("%s[%s] cannot be published again: %s", row.key.task_name, row.key.message_id, error)
            if row.status is Status.PROCESSING:
                ended = self._store.abandon(row, error=f"{ABANDONED}; {error}", unique_for=task.idempotency.unique_for)
                if ended:
                    self._tell(OutcomeKind.ABANDONED, row, "abandoned")
            return None
        if options.get("exchange_type") == FANOUT and (row.published_at or row.key.message_id != options["message_id"]):
            self._end_broadcast(task, row, options["message_id"])
            return None
        # A copy's own row is known by its task id; the message in it says which message it is a copy of.
        message_id = options.get("message_id") or row.key.message_id
        key = MessageKey(message_id, row.key.task_name)
        # Behind a copy's retry a row has the copy's message: what waits on it waits under the copy's own Celery id.
        task_id = options.get("task_id") or row.task_id
        # A retry says itself whose calls it makes.
        sent = Marker.delivered(key, task_id, options.get("headers")) or Marker.new(key, task_id)
        marker = replace(sent, fingerprint=row.fingerprint, holds=0, trace=trace_of(row.message))
        if key != row.key:
            marker = replace(marker, copied=True, call=None if row.key.message_id == task_id else row.key.message_id)
        elif marker.first is None and task_id != row.task_id:
            marker = replace(marker, first=row.task_id)
        # What the row knows better, and what was true of one delivery only.
        replaced: tuple[str, ...] = (
            "eta",
            "task_id",
            "message_id",
            "retries",
            "redelivered",
            "is_eager",
            "ignore_result",
        )
        if row.processed_status is ProcessedStatus.SUCCESS:
            replaced += ("expires",)  # its body ran in time
        kept = {name: value for name, value in options.items() if name not in replaced}
        return partial(
            publish,
            task,
            args,
            kwargs,
            marker=marker,
            due_in=row.available_in if row.status is Status.PENDING else None,
            ignore_result=options.get("ignore_result", task.ignore_result),
            retries=row.attempt,
            **kept,
        )

    def _end_broadcast(self, task: Guarded, row: Row, message_id: str) -> None:
        """End what went to each worker, since nobody else is to get it again: the producer's row, or that of a worker that died."""
        unique_for = task.idempotency.unique_for
        if row.status is Status.PROCESSING:
            ended = self._store.abandon(row, error=ABANDONED, unique_for=unique_for)
        elif row.key.message_id == message_id:
            end_broadcast(task, NewMessage(row.key, row.task_id))
            ended = False
        elif row.attempt == 0:
            ended = False  # given back to the broker, which has it
        else:
            error = f"{ABANDONED}; a retry to a fanout exchange is not published again"
            ended = self._store.cancel(row.key, task_id=row.task_id, error=error, unique_for=unique_for)
        if ended:
            self._tell(OutcomeKind.ABANDONED, row, "abandoned")

    def _tell(self, kind: OutcomeKind, row: Row, reason: str) -> None:
        """Tell the app's hooks, if it has any, what became of a row."""
        outcomes = self._queue_log.outcomes
        if outcomes is not None:
            outcomes.tell(
                kind, row.key, row=row, task_id=row.task_id, queue=row.queue, attempt=row.attempt, reason=reason
            )


def _lapsed_and_paused(row: Row) -> bool:
    return _has_paused(row, since=row.lease_expires_at)


def _overtaken_and_paused(row: Row) -> bool:
    # A retry waits since it was due, which no message of its own that it had before has to do with.
    return _has_paused(row, since=row.available_at or row.created_timestamp)


def _has_paused(row: Row, *, since: datetime | None) -> bool:
    """Whether it is time to publish a row once more: each pause is as long as all before it together."""
    if row.published_at is None or since is None or row.published_at <= since:
        return True
    return row.read_at - row.published_at >= min(row.published_at - since, _LONGEST_PAUSE)
