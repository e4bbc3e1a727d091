"""The verbs by which a message goes on or ends: each is fenced by a token, or compares the row as it was read."""

from __future__ import annotations

from typing import Protocol

from celery_idempotent.core.records import Claim, Holder, MessageKey, NewMessage, NoResultReason, Row

__all__ = ["Ender"]


class Ender(Protocol):
    """Writes how a run, or a message, ended."""

    def checkpoint(self, claim: Claim, *, result: bytes | None, lease: float | None = None) -> bool:
        """Note the recovery point: the body ran, its result is stored, its callbacks are about to be dispatched.

        Args:
            claim: The run whose body ended.
            result: Encoded return value.
            lease: Seconds until others may take over, from now; > 0. ``None`` leaves the lease as it is.

        Returns:
            Whether the claim still held; repeating a checkpoint that was written answers ``True``.

        Atomicity: one statement.
        """
        ...

    def complete(
        self, claim: Claim, *, result: bytes | None, note: NoResultReason | None = None, unique_for: float | None = None
    ) -> bool:
        """End a message as ``done``/``success`` and empty its ``message``.

        Args:
            claim: The run that ends.
            result: Encoded return value; ``None`` keeps what a checkpoint stored.
            note: Why there is no result to replay; kept in ``error``.
            unique_for: Seconds until the id becomes free again; ``None`` until it is purged.

        Returns:
            Whether the claim still held; repeating a completion that was written answers ``True``.

        Atomicity: one statement when the claim holds.
        """
        ...

    def fail(self, holder: Holder, *, error: str, unique_for: float | None = None) -> bool:
        """End a message as ``done``/``failure``; its ``message`` stays, so that it can be requeued.

        Args:
            holder: The run that ends, by its claim, or by its worker: then only a processing row qualifies, and no recovery
                point, whose body has had its effect.
            error: Type and text of the error.
            unique_for: Seconds until the id becomes free again; ``None`` until it is purged.

        Returns:
            Whether the holder still held it; repeating a failure that was written answers ``True`` for a claim.

        Atomicity: one statement when the holder holds.
        """
        ...

    def retry(self, holder: Holder, message: NewMessage) -> bool:
        """Hand a running message on to its next attempt: back to pending, waiting for ``message.attempt``.

        Args:
            holder: The run that hands over; by its worker, no recovery point is.
            message: What is published next; its attempt, delay, fingerprint, queue and message replace the row's.

        Returns:
            Whether the holder still held it.

        Atomicity: one statement.
        """
        ...

    def release(self, holder: Holder) -> bool:
        """Give a running message back as it was: pending, same attempt (``Reject(requeue=True)``).

        Args:
            holder: The run that gives it back; by its worker, no recovery point is.

        Returns:
            Whether the holder still held it.

        Atomicity: one statement.
        """
        ...

    def expire(self, holder: Holder) -> bool:
        """End a lease now: its owner is known to be dead. The row stays ``processing``, open to a takeover.

        Returns:
            Whether the holder still held it.

        Atomicity: one statement.
        """
        ...

    def abandon(self, row: Row, *, error: str, unique_for: float | None = None) -> bool:
        """End a message whose owner's lease ran out as ``done``/``failure``.

        Returns:
            Whether the row still stood as read, its lease still expired.

        Atomicity: one statement (compare and set on the token, and on the lease by the store's clock).
        """
        ...

    def cancel(self, key: MessageKey, *, task_id: str, error: str, unique_for: float | None = None) -> bool:
        """End a pending message that will not run (revoked, expired) as ``done``/``failure``.

        Args:
            key: The message.
            task_id: The Celery id that was revoked; a row first sent under another one is left alone.
            error: Why.
            unique_for: Seconds until the id becomes free again; ``None`` until it is purged.

        Returns:
            Whether a pending row was ended.

        Atomicity: one statement.
        """
        ...

    def forbid(self, row: Row, *, error: str) -> bool:
        """Note in a running message's ``error`` that it is not to run again if its owner dies (revoked, expired).

        The owner goes on, and what it writes replaces the note.

        Args:
            row: A ``processing`` row that is no recovery point, as it was read.
            error: Why.

        Returns:
            Whether the row was still processing under the same token, and no recovery point.

        Atomicity: one statement.
        """
        ...
