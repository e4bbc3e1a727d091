"""The verbs by which a producer records its calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from celery_idempotent.core.records import Duplicate, Inserted, MessageKey, NewMessage, Row

__all__ = ["Recorder"]


class Recorder(Protocol):
    """The verbs that record calls, and take them back."""

    def record(self, message: NewMessage) -> Inserted | Duplicate:
        """Record a message as pending unless its id is taken.

        An id whose ``expires_at`` has passed is free: its row starts again and keeps only its token. So a run of the old
        message that still lives stays fenced.

        Args:
            message: The message that is about to be published.

        Returns:
            ``Inserted``, or ``Duplicate`` with the row that has the id.

        Atomicity: one statement when the id is new; of N concurrent callers exactly one gets ``Inserted``.
        """
        ...

    def record_all(self, messages: Sequence[NewMessage]) -> list[Inserted | Duplicate]:
        """Record many messages, each as :meth:`record` would.

        Args:
            messages: The messages that are about to be published, in the order in which the relay publishes them. If two have one id,
                the second is a duplicate of the first.

        Returns:
            The answer of :meth:`record` for each message.

        Atomicity: each message separately. As few statements as the store can: one for all new messages, if it has an insert of many
        rows that leaves out existing ones.
        """
        ...

    def withdraw(self, key: MessageKey, *, task_id: str) -> bool:
        """Take back a message whose publication failed.

        Args:
            key: The message.
            task_id: The Celery task id it was recorded under.

        Returns:
            Whether a row was deleted. It must be pending, unclaimed and recorded under that task id.

        Atomicity: one statement.
        """
        ...

    def resubmit(self, row: Row, message: NewMessage) -> bool:
        """Make a failed message pending again, to be published once more. Its ``steps`` stay.

        Args:
            row: The ``done``/``failure`` row as it was read.
            message: The message to publish now; its task id, message, fingerprint, queue, attempt and delay replace the row's.

        Returns:
            Whether the row still stood as read; ``False`` means that another caller was first.

        Atomicity: one statement (compare and set on status, token and task id).
        """
        ...

    def republish(self, row: Row) -> bool:
        """Record that a message is handed to the broker again (``published_at`` is now).

        Args:
            row: A pending row, or a processing one whose lease ran out, as it was read.

        Returns:
            Whether the row still stood as read (same status, token and ``published_at``, lease still run out): of N callers one
            publishes.

        Atomicity: one statement.
        """
        ...

    def count_duplicate(self, key: MessageKey) -> None:
        """Add one to ``duplicates``: a copy of this message was skipped, on either side."""
        ...
