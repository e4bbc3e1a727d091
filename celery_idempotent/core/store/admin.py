"""The verbs by which operators, and the doctor, read a queue log and change it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from celery_idempotent.core.records import LogHealth, MessageKey, ProcessedStatus, Row, RowFilter, TaskCount

__all__ = ["Operator"]


class Operator(Protocol):
    """The verbs that read rows, count them and forget them."""

    def find(self, key: MessageKey) -> Row | None:
        """Return the row of a message, or ``None``."""
        ...

    def rows(self, where: RowFilter) -> Iterator[Row]:
        """Return the rows that match, newest first. ``message``, ``result`` and ``steps`` are left out (``None``): they can be large.

        A filter by ``processed_status`` never returns a forgotten row.
        """
        ...

    def counts(self) -> list[TaskCount]:
        """Count the rows of each task and status, without forgotten ones; ordered by task name, status and processed status."""
        ...

    def forget(self, row: Row) -> bool:
        """Empty a row of any status and free its id: the next message under it is new.

        Its contents (message, result, steps, fingerprint, error) are deleted. The row stays until it is purged, as ``done``/``failure`` with
        the error ``forgotten``, to keep its token: a run of the old message that still lives stays fenced, and learns at its end
        that its claim is lost. Counts leave the row out.

        Hazard: if the broker still has a copy of the message, the copy runs as a new message.

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
        """Return what is waiting, and for how long. One statement; it reads the rows that are not done, and the oldest done one.

        It creates nothing: if the store creates its schema on first use, call :meth:`inspect` first.
        """
        ...

    def configuration(self) -> Mapping[str, str]:
        """Return the server's settings on which the store's guarantees depend, by the server's names. Nothing is written or created.

        Returns:
            Those that this account may read; none if it may read nothing. If a node of a cluster differs, its value is added, with
            the node in brackets after the name.
        """
        ...
