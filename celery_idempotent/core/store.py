"""The port through which the queue log is read and written.

A store keeps rows and answers by its own clock; it takes no decision that needs Celery. Every method is atomic and safe
between threads, processes and hosts. Each raises :class:`~celery_idempotent.errors.StoreUnavailableError` when the store gave
no answer (nothing is known to have been written, and the call may be repeated) and
:class:`~celery_idempotent.errors.SchemaError` when the table is missing or behind. The suite in
:mod:`celery_idempotent.testing` is the contract in executable form.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from celery_idempotent.core.records import (
    Change,
    Claim,
    Claimed,
    Condition,
    Found,
    Holder,
    MessageKey,
    NewMessage,
    Note,
    ProcessedStatus,
    Recorded,
    Row,
    RowFilter,
    Taken,
    TaskCount,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

__all__ = ["BATCH", "LARGE_MESSAGE", "Store", "TransactionalStore"]

#: Bytes up to which the verbs that recovery lists rows by read the messages too: some hundreds of them are in memory at once.
LARGE_MESSAGE = 64 * 1024

#: Rows that one statement of recovery, the relay or the purge reads or deletes.
BATCH = 200


class Store(Protocol):
    """Where the queue log lives."""

    # -- producer ------------------------------------------------------------------------------------------------------

    def record(self, message: NewMessage) -> Recorded | Found:
        """Record a message as pending unless its id is taken.

        An id whose ``expires_at`` has passed is free: its row starts anew, keeping only its token, so that a run of the old
        message that still lives stays fenced.

        Args:
            message: What is about to be published.

        Returns:
            ``Recorded``, or ``Found`` with the row that has the id.

        Atomicity: one statement when the id is new; of N concurrent callers exactly one is told ``Recorded``.
        """
        ...

    def record_all(self, messages: Sequence[NewMessage]) -> list[Recorded | Found]:
        """Record many messages, each as :meth:`record` would.

        Args:
            messages: What is about to be published, in the order in which the relay is to publish it. A message whose id is taken
                by one before it in the list is found, not recorded.

        Returns:
            What :meth:`record` would answer, message by message.

        Atomicity: each message on its own. As few statements as the store can: one for all that are new, where it has an insert of
        many rows that yields to those that are there.
        """
        ...

    def withdraw(self, key: MessageKey, *, task_id: str) -> bool:
        """Take back a message whose publication failed.

        Args:
            key: The message.
            task_id: The Celery task id it was recorded under.

        Returns:
            Whether a row was deleted: only one that is pending, unclaimed and of that task id is.

        Atomicity: one statement.
        """
        ...

    def resubmit(self, row: Row, message: NewMessage) -> bool:
        """Make a failed message pending again, to be published once more.

        Args:
            row: The ``done``/``failure`` row as it was read.
            message: What is published now; its task id, message, fingerprint, queue, attempt and delay replace the row's.

        Returns:
            Whether the row still stood as read; ``False`` means that somebody else was first.

        Atomicity: one statement (compare and set on status, token and task id).
        """
        ...

    def republish(self, row: Row) -> bool:
        """Note that a message is handed to the broker again (``published_at`` is now).

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

    # -- consumer ------------------------------------------------------------------------------------------------------

    def claim(
        self,
        message: NewMessage,
        *,
        worker: str,
        lease: float,
        grace: float,
        adopt: Callable[[], NewMessage] | None = None,
    ) -> Claimed | Taken:
        """Take a delivered message, or report the row that stands in the way.

        Claimed are: an absent message (inserted as claimed, for a producer without this library), an id that is free
        again unless this is a copy of the message that ended (see :meth:`Row.is_free_for`), and a pending one with ``attempt <= message.attempt`` or whose ``available_at`` passed more than ``grace``
        ago. A row with another fingerprint is never claimed (either side ``None`` compares equal). ``message.attempt``
        is the delivery's ``retries``; the row keeps the greater of both. A claim adds one to the token, clears
        ``processed_status``, ``error`` and ``available_at``, and sets ``ran_task_id`` to ``message.task_id``.

        Args:
            message: The delivery.
            worker: Who claims, as ``host:pid`` or ``host:pid:thread``; at most 255 characters.
            lease: Seconds until others may take over; > 0.
            grace: Seconds after ``available_at`` at which a copy with fewer retries may run too; >= 0.
            adopt: Called when the message is absent, for the full record (with the encoded message) to insert;
                ``None`` inserts ``message`` as it is.

        Returns:
            ``Claimed`` with a fresh token, or ``Taken`` with the row as it stands.

        Atomicity: one statement for a recorded, pending message; of N concurrent callers exactly one claims.
        """
        ...

    def take_over(self, row: Row, *, task_id: str, worker: str, lease: float, attempt: int) -> Claimed | None:
        """Claim a message from an owner whose lease ran out.

        ``processed_status`` and ``result`` stay: a recovery point is replayed by its new owner. ``attempt`` becomes the
        greater of the row's and the delivery's; ``takeovers`` counts one more, until the next attempt is claimed.

        Args:
            row: The ``processing`` row as it was read.
            task_id: The Celery id of the delivery; it becomes ``ran_task_id``.
            worker: Who claims.
            lease: Seconds until others may take over; > 0.
            attempt: Celery's retry count of the delivery.

        Returns:
            ``Claimed`` with token + 1, or ``None`` when the row changed or its lease was renewed since.

        Atomicity: one statement (compare and set on the token, and on the lease by the store's clock).
        """
        ...

    def renew(self, holders: Sequence[Holder], *, lease: float) -> list[Holder]:
        """Extend leases to ``lease`` seconds from now. One that is longer stays as it is, and its row is not written.

        Args:
            holders: Runs to keep alive, by their claims or their workers; an empty list asks nothing.
            lease: Seconds; > 0.

        Returns:
            The holders that do not hold their message any more: their token or worker is no longer the row's, or the row is not
            processing.

        Atomicity: each lease on its own. A lease that ran out but was not taken over is renewed.
        """
        ...

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
        self, claim: Claim, *, result: bytes | None, note: Note | None = None, unique_for: float | None = None
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

    # -- recovery ------------------------------------------------------------------------------------------------------

    # Rows come without results, and with messages of at most :data:`LARGE_MESSAGE` bytes: `find` reads a larger one.

    def lapsed(self, *, again_after: float, limit: int, tasks: Collection[str] | None = None) -> list[Row]:
        """Processing rows whose lease ran out, and which were not published since, or not for ``again_after`` seconds.

        Args:
            again_after: Seconds; >= 0.
            limit: At most so many, those whose lease ran out first coming first.
            tasks: Only rows of these tasks.

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
    ) -> list[Row]:
        """Pending rows that were published, and due, more than ``older_than`` seconds ago.

        Args:
            older_than: Seconds; >= 0.
            limit: At most so many, those that were not published for longest first.
            before: Only those routed to these queues, and for each of them only those published, and due, before this moment of the
                store's clock.
            tasks: Only rows of these tasks.

        Returns:
            The rows, with their messages if these are not large.
        """
        ...

    def unsent(self, *, limit: int, tasks: Collection[str] | None = None) -> list[Row]:
        """Pending rows that were never handed to the broker (``published_at`` is null), oldest first.

        With their messages if these are not large; only of these tasks.

        Those of one recorder come in the order in which it recorded them. A row whose lease lives is being published by whoever
        recorded it, or by a relay: see :meth:`relay`.
        """
        ...

    def relay(self, row: Row, *, lease: float) -> bool:
        """Take the right to publish a row that was never handed to the broker, and the unsent rows behind it.

        Args:
            row: A row of :meth:`unsent`, as it was read.
            lease: Seconds for which nobody else relays it; > 0. A relay that dies leaves it to others then.

        Returns:
            Whether the row was still unsent and nobody had that right: of N callers one has it.

        Atomicity: one statement.
        """
        ...

    def relayed(self, keys: Sequence[MessageKey], *, published: bool) -> None:
        """Give up the right to publish rows that were never handed to the broker.

        Args:
            keys: The rows; an empty list asks nothing. What was claimed meanwhile, or published by somebody else, is left alone.
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

        Atomicity: one transaction of at most ``limit`` rows; a row that starts anew meanwhile stays.
        """
        ...

    def newest(self, *, limit: int) -> list[Row]:
        """Rows that were claimed, newest first, out of those that run and those that ended last, without ``message`` and ``result``.

        Args:
            limit: At most so many of either, > 0; it costs no more than these, however long the log is.
        """
        ...

    def find_all(self, keys: Collection[MessageKey]) -> list[Row]:
        """Those rows of some messages that are there, in any order, without ``message`` and ``result``.

        Atomicity: one statement for some hundreds of rows.
        """
        ...

    # -- operators -----------------------------------------------------------------------------------------------------

    def find(self, key: MessageKey) -> Row | None:
        """The row of a message, or ``None``."""
        ...

    def rows(self, where: RowFilter) -> Iterator[Row]:
        """Rows that match, newest first. ``message`` and ``result`` are left out (``None``): they can be large."""
        ...

    def counts(self) -> list[TaskCount]:
        """How many rows stand where, by task; ordered by task name, status and processed status."""
        ...

    def forget(self, row: Row) -> bool:
        """Empty a row and free its id, whatever its status: the next message under it is new.

        What was in it (message, result, fingerprint, error) is gone. The row itself stays until it is purged, as ``done``/``failure``
        with the error ``forgotten``, because its token must outlive it: a run of the old message that still lives stays fenced, and
        is told at its end that its claim is lost.

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
        """How many rows :meth:`purge` would delete now, if it had no limit."""
        ...

    def condition(self) -> Condition:
        """What is waiting, and for how long. One statement; it reads what is not done, and the oldest of what is.

        Nothing is made: where the schema is made on first use, ask :meth:`inspect` before.
        """
        ...

    def configuration(self) -> Mapping[str, str]:
        """The server's settings that what the store promises depends on, by its own names for them. Nothing is written or made.

        Returns:
            As many of them as the server tells this account; none if it tells nothing. Of a cluster, what a node says that differs is
            there once more, with the node in brackets behind the name.
        """
        ...

    # -- life cycle ----------------------------------------------------------------------------------------------------

    def init(self, *, before: Callable[[Change], None] | None = None) -> bool:
        """Create the table if it is missing, or take one of an older version to this one; beside those who use it.

        Code that is one version older goes on on a table of this version. Any number may do this at once.

        Args:
            before: Called before each change: a large table takes its time.

        Returns:
            Whether anything was created or changed.

        Raises:
            SchemaError: A table of that name is there and is of no version that this one knows; it is not touched.

        Atomicity: none over all changes. What is broken off is taken up by the next ``init``.
        """
        ...

    def outstanding(self) -> Sequence[Change]:
        """What :meth:`init` would do, in this order; nothing when the schema is of this version. Nothing is made or written.

        Raises:
            SchemaError: As :meth:`init`.
        """
        ...

    def check(self) -> None:
        """Reach the store and compare its schema with this version's.

        Raises:
            SchemaError: The table is missing, or lacks columns.
        """
        ...

    def inspect(self) -> bool:
        """Do what :meth:`check` does, and make nothing and write nothing where that makes what is missing.

        Returns:
            Whether the schema is there. ``False`` only from a store that makes it on first use: then it is not missing.

        Raises:
            SchemaError: The table is missing, or lacks columns.
        """
        ...

    def close(self) -> None:
        """Let go of connections. The store may be used again and opens new ones."""
        ...


class TransactionalStore(Store, Protocol):
    """A store in a database that can hold its users' tables too: what ``atomic=True`` needs."""

    @property
    def engine(self) -> Engine:
        """An engine for transactions on the store's database, one per process."""
        ...

    def within(self, connection: Connection) -> Store:
        """The same store, with its verbs in a transaction of the caller's.

        What they write takes effect, and is seen by others, when the caller commits. Nothing is repeated, and errors are the
        database's own: what they make of the transaction is the caller's affair. A message that is found to be there is not locked by
        that, where the database leaves the choice (MySQL and MariaDB keep a shared lock on its row until the transaction ends).

        Args:
            connection: One of :attr:`engine`'s database, in a transaction.

        Raises:
            ConfigurationError: It is a connection to another kind of database.
            SchemaError: The table is not there; by the verbs, too, where the connection leads to a database that lacks it.
        """
        ...

    def recorded(self, keys: Sequence[MessageKey]) -> Mapping[MessageKey, str]:
        """Which of these messages have a row now, whatever its status, and under which Celery task id each was recorded.

        Args:
            keys: The messages; an empty list asks nothing.

        Atomicity: one statement for some hundreds of rows.
        """
        ...

    def gave_up(self, connection: Connection) -> bool | None:
        """Whether the database has given a transaction up, so that its commit would be a rollback, without an error.

        Args:
            connection: In the transaction.

        Returns:
            ``None`` when the driver does not tell: then it is known by what is there after the commit.
        """
        ...

    def gave_way(self, error: BaseException) -> bool:
        """Whether a transaction that met an error took no effect, and may if all of it is done again.

        So it is after a deadlock, a serialization failure or a lock that was waited for in vain; after a connection that broke,
        unless it broke while the transaction was being committed; and when the database takes nothing for now, as while it is read-only.
        """
        ...

    def collided(self, error: BaseException) -> bool:
        """Whether it did so in favour of another transaction: a deadlock, a serialization failure, a lock that was waited for in vain."""
        ...
