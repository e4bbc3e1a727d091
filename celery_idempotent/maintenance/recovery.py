"""Recovery: a pass publishes messages that a worker, a broker or a producer lost, and purges old rows.

Each kind of work has a module: :mod:`~celery_idempotent.maintenance.rescue`, :mod:`~celery_idempotent.producer.relay` and
:mod:`~celery_idempotent.maintenance.purge`. Any number of passes may run at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from celery_idempotent.core.records import Row
from celery_idempotent.core.store import BATCH
from celery_idempotent.maintenance.purge import purge, purgeable
from celery_idempotent.maintenance.rescue import Rescue
from celery_idempotent.producer.box import PUBLISH_WITHIN
from celery_idempotent.producer.recorded import is_ours, own_tasks
from celery_idempotent.producer.relay import RELAY_LEASE, relay

if TYPE_CHECKING:
    from celery_idempotent.queue_log import QueueLog

__all__ = ["Due", "Recovered", "Recovery"]

#: Seconds that ``recover`` waits in all for rows that other, possibly dead, processes are publishing; and between two checks.
_IN_FLIGHT = max(RELAY_LEASE, PUBLISH_WITHIN) + 1.0
_LOOK_EVERY = 0.2

#: How many batches of committed but unpublished messages a pass relays. Of other messages, it publishes one batch.
_RELAYED = 25


@dataclass(frozen=True, slots=True)
class Recovered:
    """The result of a pass.

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
        """Whether there may be more to do, because a limit was reached."""
        published = max(self.taken_back, self.relayed, self.lost)
        return published >= BATCH or (self.purged > 0 and self.purged % BATCH == 0)


@dataclass(frozen=True, slots=True)
class Due:
    """The rows that are due for recovery.

    Attributes:
        taken_back: Rows whose owner's lease ran out.
        relayed: Rows that were recorded and never handed to the broker, and that no process is publishing.
        lost: Rows that the broker is presumed to have lost.
        purged: How many rows would be deleted.
    """

    taken_back: tuple[Row, ...] = ()
    relayed: tuple[Row, ...] = ()
    lost: tuple[Row, ...] = ()
    purged: int = 0


class Recovery:
    """Recover the messages of one queue log, a pass at a time.

    Args:
        queue_log: The queue log; its app publishes.
    """

    def __init__(self, queue_log: QueueLog) -> None:
        self._queue_log = queue_log
        self._rescue = Rescue.of(queue_log)

    def run_pass(self) -> Recovered:
        """Run one pass.

        Raises:
            StoreError: The store did not answer, or its schema has another version.
            kombu.exceptions.OperationalError: The broker did not take a message; its row waits for the next pass.
        """
        self._rescue.doubt_turned_off()
        return Recovered(
            taken_back=self._rescue.publish_lapsed(),
            relayed=relay(self._queue_log, at_most=_RELAYED * BATCH).published,
            lost=self._rescue.publish_overtaken(),
            purged=purge(self._queue_log),
        )

    def passes(
        self,
        *,
        lost_after: float | None = None,
        task: str | None = None,
        in_flight: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Recovered]:
        """Run passes until nothing more is due: for a process that does nothing else.

        Such a process has seen no deliveries. So it reads from the table which messages run or ran lately, and may have overtaken others.

        Args:
            lost_after: As for :meth:`Rescue.publish_waiting`, which is then called last; ``None`` leaves it out.
            task: As for :meth:`Rescue.publish_waiting`.
            in_flight: Whether to wait some seconds for rows that other processes are publishing, since these may be dead.
            stopped: Called after each batch; stop if it returns true.

        Raises:
            StoreError: As for :meth:`run_pass`.
            kombu.exceptions.OperationalError: As for :meth:`run_pass`.
        """
        more, patience = True, time.monotonic() + _IN_FLIGHT
        while more and not stopped():
            self._rescue.see_what_ran()
            done = self.run_pass()
            yield done
            more = done.more
            while in_flight and not more and not stopped() and time.monotonic() < patience:
                rest = relay(self._queue_log, at_most=math.inf, stopped=stopped)
                yield Recovered(relayed=rest.published)
                if not rest.in_flight:
                    break
                time.sleep(min(rest.in_flight, _LOOK_EVERY))
        if lost_after is not None and not stopped():
            yield Recovered(lost=self._rescue.publish_waiting(lost_after, task=task, stopped=stopped))

    def due(self, *, lost_after: float | None = None, task: str | None = None, at_most: int = 1000) -> Due:
        """Return what :meth:`passes` would do, without publishing, changing or deleting anything.

        Args:
            lost_after: As for :meth:`passes`.
            task: As for :meth:`passes`.
            at_most: How many rows of each kind to read.

        Raises:
            StoreError: As for :meth:`run_pass`.
        """
        queue_log, rescue = self._queue_log, self._rescue
        rescue.see_what_ran()
        lapsed = rescue.lapsed(at_most)
        lost = {row.key: row for row in rescue.overtaken(at_most)}
        if lost_after is not None:
            lost.update((row.key, row) for row in rescue.waiting(lost_after, task=task, at_most=at_most))
        unsent = queue_log.store.unsent(limit=at_most, tasks=own_tasks(queue_log))
        return Due(
            taken_back=tuple(row for row in lapsed if is_ours(queue_log, row)),
            relayed=tuple(row for row in unsent if row.lease_left <= 0 and is_ours(queue_log, row)),
            lost=tuple(row for row in lost.values() if is_ours(queue_log, row)),
            purged=purgeable(queue_log),
        )
