"""Recent duplicates, from the workers' events and from the rows that ran or ended last."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from celery_idempotent.contrib.flower.event_log import Copy, EventLog
from celery_idempotent.contrib.flower.snapshot import LISTED, Glance
from celery_idempotent.core.records import MessageKey, Row

__all__ = ["Duplicates", "latest_duplicates"]


@dataclass(frozen=True, slots=True)
class Duplicates:
    """The copies of a message that were skipped.

    Attributes:
        key: The message.
        row: Its row, if it is among those that ran or ended last.
        copy: The copy that was skipped last, if Flower received an event.
    """

    key: MessageKey
    row: Row | None = None
    copy: Copy | None = None

    @property
    def at(self) -> datetime | None:
        """When the last one was skipped; ``None`` if unknown."""
        return None if self.copy is None else datetime.fromtimestamp(self.copy.at, UTC)

    @property
    def order(self) -> datetime:
        """The sort key: ``at``, or when the message was last written."""
        if self.at is not None:
            return self.at
        assert self.row is not None  # there is a row or a copy
        return self.row.processed_timestamp or self.row.created_timestamp


def latest_duplicates(glance: Glance, event_log: EventLog) -> list[Duplicates]:
    """Return messages with skipped copies or repeated calls, the latest first.

    A repeated call that its producer skipped sends no event. It shows in its message's row, but only while that is among the rows that
    run or ended last.
    """
    found = {row.key: Duplicates(row.key, row) for row in glance.latest if row.duplicates}
    for copy in event_log.skipped():
        known = found.get(copy.key)
        if known is None or known.copy is None:  # `skipped` begins with the latest
            found[copy.key] = Duplicates(copy.key, None if known is None else known.row, copy)
    return sorted(found.values(), key=lambda duplicates: duplicates.order, reverse=True)[:LISTED]
