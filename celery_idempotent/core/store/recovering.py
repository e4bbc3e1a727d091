"""The verbs of recovery, the relay and the purge."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from celery_idempotent.core.records import MessageKey, ProcessedStatus, Row

__all__ = ["Recoverer"]


class Recoverer(Protocol):
    """Lists what is due for recovery, and notes what was done about it."""

    # Rows come without results, and with messages of at most :data:`LARGE_MESSAGE` bytes: `find` reads a larger one.

    def lapsed(
        self, *, again_after: float, limit: int, tasks: Collection[str] | None = None, doubted: bool = True
    ) -> list[Row]:
        """Return processing rows whose lease ran out, and which were not published since, or not for ``again_after`` seconds.

        Args:
            again_after: Seconds; >= 0.
            limit: At most so many, those whose lease ran out first coming first.
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
            limit: At most so many, those that were not published for longest first.
            before: Only those routed to these queues, and for each of them only those published, and due, before this moment of the
                store's clock.
            tasks: Only rows of these tasks.
            doubted: Whether to return rows that :meth:`doubt` has noted, too.

        Returns:
            The rows, with their messages if these are not large.
        """
        ...

    def unsent(self, *, limit: int, tasks: Collection[str] | None = None) -> list[Row]:
        """Return pending rows that were never handed to the broker (``published_at`` is null), oldest first.

        With their messages if these are not large; only of these tasks.

        Those of one recorder come in the order in which it recorded them. A row whose lease lives is being published by its
        recorder, or by a relay: see :meth:`relay`.
        """
        ...

    def relay(self, row: Row, *, lease: float) -> bool:
        """Take the right to publish a row that was never handed to the broker, and the unsent rows after it.

        Args:
            row: A row of :meth:`unsent`, as it was read.
            lease: Seconds for which no other relay takes it; > 0. If this relay dies, others take over after that.

        Returns:
            Whether the row was still unsent and the right was free: of N callers one gets it.

        Atomicity: one statement.
        """
        ...

    def relayed(self, keys: Sequence[MessageKey], *, published: bool) -> None:
        """Give up the right to publish rows that were never handed to the broker.

        Args:
            keys: The rows; an empty list asks nothing. A row that was claimed or published meanwhile is left alone.
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
        """Delete rows that were done more than ``older_than`` seconds ago, but for ids that ``expires_at`` keeps taken.

        Args:
            older_than: Seconds; >= 0.
            limit: At most so many.
            failures_older_than: Seconds since a failure that can be requeued was done (its message is there); never less than
                ``older_than``. ``None`` for the same.
            task_name: Exact task name, or a pattern with ``*`` and ``?``.
            processed_status: Only rows that ended so.

        Returns:
            How many were deleted; fewer than ``limit`` when there are no more.

        Atomicity: one transaction of at most ``limit`` rows; a row that starts again meanwhile stays.
        """
        ...

    def newest(self, *, limit: int) -> list[Row]:
        """Return rows that were claimed, newest first: those that run, and those that ended last; without ``message`` and ``result``.

        Args:
            limit: At most so many of either, > 0; it costs no more than these, however long the log is.
        """
        ...

    def find_all(self, keys: Collection[MessageKey]) -> list[Row]:
        """Return the rows of some messages that are there, in any order, without ``message`` and ``result``.

        Atomicity: one statement for some hundreds of rows.
        """
        ...
