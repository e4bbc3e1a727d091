"""The verbs of recovery, the relay and the purge."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from celery_idempotent.core.records import MessageKey, ProcessedStatus, Row

__all__ = ["Recoverer"]


class Recoverer(Protocol):
    """The verbs that list what is due for recovery, and note what was done about it."""

    # Rows come without results and steps, and with messages of at most :data:`LARGE_MESSAGE` bytes: `find` reads a larger one.

    def lapsed(
        self, *, again_after: float, limit: int, tasks: Collection[str] | None = None, doubted: bool = True
    ) -> list[Row]:
        """Return processing rows whose lease ran out, and that were not published since then, or not for ``again_after`` seconds.

        Args:
            again_after: Seconds; >= 0.
            limit: The most rows to return, in the order in which their leases ran out.
            tasks: Only rows of these tasks.
            doubted: Whether to return rows that :meth:`doubt` has noted, too.

        Returns:
            The rows, with their messages if these are not large.
        """
        ...

    def waiting(
        self,
        *,
        older_than: float,
        limit: int,
        before: Mapping[str, datetime] | None = None,
        tasks: Collection[str] | None = None,
        doubted: bool = True,
    ) -> list[Row]:
        """Return pending rows that were published, and due, more than ``older_than`` seconds ago.

        Args:
            older_than: Seconds; >= 0.
            limit: The most rows to return, those first that were not published for longest.
            before: Only rows of these queues, and of each queue only those published, and due, before this moment of the store's
                clock.
            tasks: Only rows of these tasks.
            doubted: Whether to return rows that :meth:`doubt` has noted, too.

        Returns:
            The rows, with their messages if these are not large.
        """
        ...

    def unsent(self, *, limit: int, tasks: Collection[str] | None = None) -> list[Row]:
        """Return pending rows that were never handed to the broker (``published_at`` is null), oldest first.

        Rows of one recorder come in the order in which it recorded them. A row with a live lease is being published by its
        recorder, or by a relay: see :meth:`relay`.

        Args:
            limit: The most rows to return.
            tasks: Only rows of these tasks.

        Returns:
            The rows, with their messages if these are not large.
        """
        ...

    def relay(self, row: Row, *, lease: float) -> bool:
        """Take the right to publish a row that was never handed to the broker, and the unsent rows after it.

        Args:
            row: A row of :meth:`unsent`, as it was read.
            lease: Seconds for which no other relay takes the right; > 0. If this relay dies, others take over after that.

        Returns:
            Whether the row was still unsent and the right was free: of N callers one gets it.

        Atomicity: one statement.
        """
        ...

    def relayed(self, keys: Sequence[MessageKey], *, published: bool) -> None:
        """Give up the right to publish rows that were never handed to the broker.

        Args:
            keys: The rows; an empty list runs no query. A row that was claimed or published meanwhile is left alone.
            published: Whether they were handed to the broker (``published_at`` is now), or are left to others.

        Atomicity: one statement for some hundreds of rows.
        """
        ...

    def not_published(self, key: MessageKey, *, token: int) -> None:
        """Take back a ``republish`` whose publication failed: ``published_at`` becomes null.

        Args:
            key: The message.
            token: The token of the row that was republished; a row claimed since is left alone.
        """
        ...

    def doubt(self, keys: Sequence[MessageKey]) -> None:
        """Note that messages may have run without the guard: ``error`` becomes ``MAY_HAVE_RUN``, until they are claimed.

        Args:
            keys: Pending rows that were published, and running ones whose lease ran out, without a recovery point. Rows that are in
                another state meanwhile, or have an ``error``, are left alone. An empty list asks nothing.

        Atomicity: one statement for some hundreds of rows.
        """
        ...

    def purge(
        self,
        *,
        older_than: float,
        limit: int,
        failures_older_than: float | None = None,
        task_name: str | None = None,
        processed_status: ProcessedStatus | None = None,
    ) -> int:
        """Delete rows that were done more than ``older_than`` seconds ago, except those whose id ``expires_at`` keeps taken.

        Args:
            older_than: Seconds; >= 0.
            limit: The most rows to delete.
            failures_older_than: The same for failures that can be requeued, since their message is kept; at least ``older_than``.
                ``None`` for ``older_than``.
            task_name: Exact task name, or a pattern with ``*`` and ``?``.
            processed_status: Only rows that ended this way.

        Returns:
            How many were deleted; fewer than ``limit`` if there are no more.

        Atomicity: one transaction of at most ``limit`` rows; a row that starts again meanwhile stays.
        """
        ...

    def newest(self, *, limit: int) -> list[Row]:
        """Return rows that were claimed, newest first: those that run, and those that ended last; without ``message``, ``result`` and ``steps``.

        Args:
            limit: The most rows of either kind; > 0. The cost does not grow with the log.
        """
        ...

    def find_all(self, keys: Collection[MessageKey]) -> list[Row]:
        """Return the existing rows of some messages, in any order, without ``message``, ``result`` and ``steps``.

        Atomicity: one statement for some hundreds of rows.
        """
        ...
