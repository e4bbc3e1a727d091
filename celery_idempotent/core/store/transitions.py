"""The verbs by which a message goes on or ends: each is fenced by a token, or compares the row as it was read."""

from __future__ import annotations

from typing import Protocol

from celery_idempotent.core.records import Claim, Holder, MessageKey, NewMessage, NoResultReason, Row

__all__ = ["Ender"]


class Ender(Protocol):
    """The verbs that write how a run, or a message, ended."""

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

    def keep_steps(self, claim: Claim, *, steps: bytes) -> bool:
        """Keep what the steps of a running body returned, in place of what was kept before.

        They stay with the row through takeovers, retries, failures and :meth:`resubmit`, until the message succeeds or is forgotten.

        Args:
            claim: The run whose body took the steps.
            steps: All of them, encoded.

        Returns:
            Whether the claim still held; repeating what was written answers ``True``.

        Atomicity: one statement.
        """
        ...

    def complete(
        self, claim: Claim, *, result: bytes | None, note: NoResultReason | None = None, unique_for: float | None = None
    ) -> bool:
        """End a message as ``done``/``success`` and empty its ``message`` and its ``steps``.

        Args:
            claim: The run that ends.
            result: Encoded return value; ``None`` keeps what a checkpoint stored.
            note: Why there is no result to replay; kept in ``error``.
            unique_for: Seconds until the id becomes free again; ``None`` until it is purged.

        Returns:
            Whether the claim still held; repeating a completion that was written answers ``True``.

        Atomicity: one statement if the claim still holds.
        """
        ...

    def fail(self, holder: Holder, *, error: str, unique_for: float | None = None) -> bool:
        """End a message as ``done``/``failure``; its ``message`` stays, so that it can be requeued.

        Args:
            holder: The run that ends, by its claim or its worker. By its worker, only a processing row without a recovery point
                qualifies: with one, the body has taken effect.
            error: Type and text of the error.
            unique_for: Seconds until the id becomes free again; ``None`` until it is purged.

        Returns:
            Whether the holder still held it; for a claim, repeating a failure that was written answers ``True``.

        Atomicity: one statement if the holder still holds it.
        """
        ...

    def retry(self, holder: Holder, message: NewMessage) -> bool:
        """Hand a running message on to its next attempt: back to pending, waiting for ``message.attempt``.

        Args:
            holder: The run that hands over. By its worker, it must have no recovery point.
            message: The message to publish next; its attempt, delay, fingerprint, queue and message replace the row's.

        Returns:
            Whether the holder still held it.

        Atomicity: one statement.
        """
        ...

    def release(self, holder: Holder) -> bool:
        """Give a running message back as it was: pending, same attempt (``Reject(requeue=True)``).

        Args:
            holder: The run that gives it back. By its worker, it must have no recovery point.

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
            Whether the row still stood as read, with its lease still expired.

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
        """Note in a running message's ``error`` that it must not run again if its owner dies (revoked, expired).

        The owner continues, and its outcome replaces the note.

        Args:
            row: A ``processing`` row without a recovery point, as it was read.
            error: Why.

        Returns:
            Whether the row was still processing under the same token, without a recovery point.

        Atomicity: one statement.
        """
        ...
