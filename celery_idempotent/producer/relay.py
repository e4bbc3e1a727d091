"""The relay: publish what was committed and never handed to the broker, in the order in which it was recorded.

A process that commits publishes right then (:mod:`celery_idempotent.producer.publisher`). What it could not publish, and what it left
when it died, is relayed: by itself before its next messages, by a worker's recovery, or by ``idempotent recover``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from celery_idempotent.core.fork_lock import no_fork
from celery_idempotent.core.records import MessageKey, Row
from celery_idempotent.core.store import BATCH
from celery_idempotent.producer.recorded import hand_over, own_tasks, publication

if TYPE_CHECKING:
    from celery_idempotent.queue_log import QueueLog

__all__ = ["RELAY_LEASE", "Relayed", "relay"]

#: Seconds for which a relay keeps others from publishing what it publishes; it ends a batch in half of that.
RELAY_LEASE = 10.0


@dataclass(frozen=True, slots=True)
class Relayed:
    """What a relay did.

    Attributes:
        published: How many messages it published.
        in_flight: Seconds for which the rest is being published by others; 0 when there is no rest.
    """

    published: int
    in_flight: float = 0.0


def relay(queue_log: QueueLog, *, at_most: float = BATCH, stopped: Callable[[], bool] = lambda: False) -> Relayed:
    """Publish what was committed and never handed to the broker, in the order in which it was recorded.

    One relay at a time publishes, by a lease on the oldest row, or the order would be lost; it leaves alone what its recorder is
    publishing, and all that comes behind that. A relay that dies in the midst has its messages published again, which their
    claims absorb.

    Args:
        queue_log: The queue log; its app publishes.
        at_most: Messages, or some more.
        stopped: Asked after each batch whether the rest is to be left.

    Raises:
        StoreError: The store gave no answer, or its schema is not of this version.
        kombu.exceptions.OperationalError: The broker did not take a message; its row waits for the next relay.
    """
    published, left, tasks = 0, set[MessageKey](), own_tasks(queue_log)
    while published < at_most and not stopped():
        # Read past what cannot be published, lest it keeps all others from being relayed.
        limit = BATCH + 2 * len(left)
        with no_fork():
            rows = queue_log.store.unsent(limit=limit, tasks=tasks)
        ours: list[tuple[Row, Callable[[], object]]] = []
        for row in rows:
            if row.key not in left:
                how = publication(queue_log, row)
                if how is None:
                    left.add(row.key)
                else:
                    ours.append((row, how))
        if not ours:
            if len(rows) < limit:
                break
            continue
        head, _ = ours[0]
        if head.lease_left > 0:
            return Relayed(published, head.lease_left)
        with no_fork():
            taken = queue_log.store.relay(head, lease=RELAY_LEASE)
        if taken:  # or somebody else was first: look who it is
            published += _relay(queue_log, ours, left)
    return Relayed(published)


def _relay(queue_log: QueueLog, ours: list[tuple[Row, Callable[[], object]]], left: set[MessageKey]) -> int:
    """Publish rows in their order, the first of which is taken; how many were. Those that cannot be are among the ``left`` then."""
    deadline = time.monotonic() + RELAY_LEASE / 2
    head = ours[0][0].key
    done: list[MessageKey] = []
    try:
        for row, publish in ours:
            if (row.lease_left > 0 and row.key != head) or time.monotonic() > deadline:
                break
            with no_fork():
                published = hand_over(queue_log, row, publish)
            if published:
                done.append(row.key)
            else:
                left.add(row.key)
    finally:
        with no_fork():
            queue_log.store.relayed(done, published=True)
            if head not in done:
                queue_log.store.relayed([head], published=False)
    return len(done)
