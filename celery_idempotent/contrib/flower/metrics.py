"""The queue log's figures as Prometheus series, shown in Flower's ``/metrics`` after its own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily

from celery_idempotent.core.records import Row

if TYPE_CHECKING:
    from celery_idempotent.contrib.flower.snapshot import Counted, Glance, Snapshot

__all__ = ["Series"]


class Series:
    """The series of an app's queue log, in their own registry, so that only Flower's ``/metrics`` shows them.

    Args:
        snapshot: The source of the series. Collecting them does not ask the store.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield all series; if the store does not answer, only that fact and the last counts."""
        glance, counted = self._snapshot.glance, self._snapshot.counted
        yield _gauge(
            "queue_log_up", "Whether the queue log's store answered when it was last asked.", glance is not None
        )
        if counted is not None:
            yield from _counted(counted, self._snapshot.took)
        if glance is not None:
            yield from _glance(glance)
            yield _gauge(
                "held_copies",
                "Copies that workers hold, from the events that Flower received.",
                len(self._snapshot.event_log.held()),
            )


def _counted(counted: Counted, took: float) -> Iterator[GaugeMetricFamily]:
    labels = ("task_name", "status", "processed_status")
    messages = GaugeMetricFamily("celery_idempotent_messages", "Messages in the queue log.", labels=labels)
    duplicates: Counter[str] = Counter()
    for count in counted.counts:
        messages.add_metric([count.task_name, count.status, count.processed_status or ""], count.rows)
        duplicates[count.task_name] += count.duplicates
    yield messages
    skipped = GaugeMetricFamily(
        "celery_idempotent_message_duplicates",
        "Skipped copies and repeated calls of the messages in the queue log.",
        labels=("task_name",),
    )
    for task_name, number in duplicates.items():
        skipped.add_metric([task_name], number)
    yield skipped
    yield _gauge("messages_age_seconds", "How long ago the messages were counted.", time.monotonic() - counted.at)
    yield _gauge("messages_count_seconds", "How long it took to count them.", took)


def _glance(glance: Glance) -> Iterator[GaugeMetricFamily]:
    claims = GaugeMetricFamily(
        "celery_idempotent_claims", "Claims, by lease; at most 100 of each kind are counted.", labels=("lease",)
    )
    lapsed: set[Row] = {row for row in glance.running if row.lease_left <= 0}
    claims.add_metric(["live"], len(glance.running) - len(lapsed))
    claims.add_metric(["expired"], max(len(lapsed), len(glance.lapsed)))
    yield claims
    since = {
        "oldest_due_seconds": (
            "How long the oldest due message that the broker has is waiting; 0 for none.",
            min((row.waiting_since for row in glance.waiting), default=None),
        ),
        "oldest_unsent_seconds": (
            "How long the oldest message that was recorded and not handed to the broker is waiting; 0 for none.",
            glance.health.unsent_since,
        ),
        "oldest_lapsed_seconds": (
            "How long ago the lease of the oldest unrecovered claim ran out; 0 for none.",
            glance.health.lapsed_since,
        ),
    }
    for name, (text, moment) in since.items():
        yield _gauge(name, text, 0.0 if moment is None else max(0.0, (glance.read_at - moment).total_seconds()))


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"celery_idempotent_{name}", text, value=float(value))
