"""The relay: publish messages that were committed and never handed to the broker, in the order of their recording.

A process that commits publishes at once (:mod:`celery_idempotent.producer.publisher`). Messages that it could not publish, or left
when it died, are relayed: by the process itself before its next messages, by a worker's recovery, or by ``idempotent recover``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from celery_idempotent.core.fork_lock import no_fork
from celery_idempotent.core.records import MessageKey, Row
from celery_idempotent.core.store import BATCH
from celery_idempotent.producer.recorded import hand_over, own_tasks, publication

if TYPE_CHECKING:
    from kombu import Producer

    from celery_idempotent.queue_log import QueueLog

__all__ = ["RELAY_LEASE", "Relayed", "relay"]

#: Seconds for which a relay leases a batch of messages; it stops publishing the batch after half of that.
RELAY_LEASE = 10.0


@dataclass(frozen=True, slots=True)
class Relayed:
    """The result of a relay.

    Attributes:
        published: How many messages it published.
        in_flight: Seconds for which others may be publishing the rest; 0 if nothing is left.
    """

    published: int
    in_flight: float = 0.0


def relay(
    queue_log: QueueLog,
    *,
    at_most: float = BATCH,
    stopped: Callable[[], bool] = lambda: False,
    producer: Producer | None = None,
) -> Relayed:
    """Publish messages that were committed and never handed to the broker, in the order of their recording.

    To keep the order, one relay at a time publishes, by a lease on the oldest row. It skips rows that their recorder is still
    publishing, and all later ones. If a relay dies, the next one publishes its batch again; claims absorb the copies.

    Args:
        queue_log: The queue log; its app publishes.
        at_most: How many messages to publish; the last batch may exceed it.
        stopped: Called after each batch; stop if it returns true.
        producer: Publishes them; by default one of the app's pool, which waits for a silent broker as Celery does.

    Raises:
        StoreError: The store did not answer, or its schema has another version.
        kombu.exceptions.OperationalError: The broker did not take a message; its row waits for the next relay.
    """
    published, left, tasks = 0, set[MessageKey](), own_tasks(queue_log)
    while published < at_most and not stopped():
        # Read past rows that cannot be published, so that they do not block the others.
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
                    ours.append((row, how if producer is None else partial(how, producer=producer)))
        if not ours:
            if len(rows) < limit:
                break
            continue
        head, _ = ours[0]
        if head.lease_left > 0:
            return Relayed(published, head.lease_left)
        with no_fork():
            taken = queue_log.store.relay(head, lease=RELAY_LEASE)
        if taken:  # otherwise another relay was first; read again
            published += _relay(queue_log, ours, left)
    return Relayed(published)


def _relay(queue_log: QueueLog, ours: list[tuple[Row, Callable[[], object]]], left: set[MessageKey]) -> int:
    """Publish rows in order, with the lease on the first; return how many were published. Add those that cannot be to ``left``."""
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
