"""Recent duplicates: what workers told of, and what the rows say that ran or ended last."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from celery_idempotent.contrib.flower.event_log import Copy, Heard
from celery_idempotent.contrib.flower.snapshot import LISTED, Glance
from celery_idempotent.core.records import MessageKey, Row

__all__ = ["Duplicates", "latest_duplicates"]


@dataclass(frozen=True, slots=True)
class Duplicates:
    """The copies of a message that were skipped.

    Attributes:
        key: The message.
        row: Its row, if it is among those that ran or ended last.
        copy: The copy that was skipped last, if Flower was told of it.
    """

    key: MessageKey
    row: Row | None = None
    copy: Copy | None = None

    @property
    def at(self) -> datetime | None:
        """When the last one was skipped, as far as that is known."""
        return None if self.copy is None else datetime.fromtimestamp(self.copy.at, UTC)

    @property
    def order(self) -> datetime:
        """What they are ordered by: that, or when the message was last written."""
        if self.at is not None:
            return self.at
        assert self.row is not None  # one of both there is
        return self.row.processed_timestamp or self.row.created_timestamp


def latest_duplicates(glance: Glance, heard: Heard) -> list[Duplicates]:
    """Messages of which copies were skipped, or that were sent again, the latest first.

    A repeated call that its producer skipped sends no event: it shows in its message's row, and that is only looked at while it is among
    those that run or ended last.
    """
    found = {row.key: Duplicates(row.key, row) for row in glance.latest if row.duplicates}
    for copy in heard.skipped():
        known = found.get(copy.key)
        if known is None or known.copy is None:  # the last one comes first
            found[copy.key] = Duplicates(copy.key, None if known is None else known.row, copy)
    return sorted(found.values(), key=lambda duplicates: duplicates.order, reverse=True)[:LISTED]
