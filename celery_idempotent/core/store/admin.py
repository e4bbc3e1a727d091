"""The verbs by which people, and the doctor, look at a queue log and change it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from celery_idempotent.core.records import LogHealth, MessageKey, ProcessedStatus, Row, RowFilter, TaskCount

__all__ = ["Operator"]


class Operator(Protocol):
    """Reads rows, counts them, and forgets them."""

    def find(self, key: MessageKey) -> Row | None:
        """Return the row of a message, or ``None``."""
        ...

    def rows(self, where: RowFilter) -> Iterator[Row]:
        """Return the rows that match, newest first. ``message`` and ``result`` are left out (``None``): they can be large.

        A forgotten row is none that failed, or that has any other ``processed_status``.
        """
        ...

    def counts(self) -> list[TaskCount]:
        """Count the rows of each task and status, but no forgotten ones; ordered by task name, status and processed status."""
        ...

    def forget(self, row: Row) -> bool:
        """Empty a row of any status and free its id: the next message under it is new.

        What was in it (message, result, fingerprint, error) is gone. The row itself stays until it is purged, as ``done``/``failure``
        with the error ``forgotten``, because its token must outlive it: a run of the old message that still lives stays fenced, and
        learns at its end that its claim is lost. It is not counted, as a failure least of all.

        Hazard: a copy of the message that the broker still has runs, as if it were new.

        Args:
            row: The row as it was read.

        Returns:
            Whether the row still stood as read (same status, token and task id).

        Atomicity: one statement.
        """
        ...

    def purgeable(
        self,
        *,
        older_than: float,
        failures_older_than: float | None = None,
        task_name: str | None = None,
        processed_status: ProcessedStatus | None = None,
    ) -> int:
        """Return how many rows :meth:`purge` would delete now, if it had no limit."""
        ...

    def health(self) -> LogHealth:
        """Return what is waiting, and for how long. One statement; it reads what is not done, and the oldest of what is.

        Nothing is made: where the schema is made on first use, ask :meth:`inspect` before.
        """
        ...

    def configuration(self) -> Mapping[str, str]:
        """Return the server's settings that what the store promises depends on, by its own names for them. Nothing is written or made.

        Returns:
            As many of them as the server tells this account; none if it tells nothing. Where a node of a cluster differs, its
            value is there too, with the node in brackets after the name.
        """
        ...
