"""The records that the queue log holds and its store returns: plain and frozen.

Nothing here depends on Celery or a database. Times are timezone-aware UTC, from the store's clock; durations are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from celery_idempotent.core.storable import FINGERPRINT, check_number, check_text

__all__ = [
    "ABANDONED",
    "DISCARDED",
    "FORGOTTEN",
    "MAY_HAVE_RUN",
    "Claim",
    "Claimed",
    "Duplicate",
    "Holder",
    "Inserted",
    "LogHealth",
    "MessageKey",
    "NewMessage",
    "NoResultReason",
    "NotClaimed",
    "Owner",
    "ProcessedStatus",
    "Row",
    "RowFilter",
    "Status",
    "TaskCount",
    "rejected",
]


class Status(StrEnum):
    """The status of a message."""

    PENDING = "pending"
    PROCESSING = "processing"
    DONE = "done"


class NoResultReason(StrEnum):
    """Why a message that succeeded has no result to replay; kept in ``error``."""

    IGNORED = "ignored"  # the body raised Ignore
    BROADCAST = "broadcast"  # it was published to a fanout exchange; each worker has its own row
    REPLACED = "replaced"  # the body replaced itself; another task answers under its Celery id
    UNKEPT = "unkept"  # the store did not take the result; the result backend may have it


#: Separates the error of a rejected message from how often it had been rejected before.
_REJECTED = "; rejected before: "


def rejected(error: str, before: int) -> str:
    """Return the ``error`` to keep for a message that its body rejected, so that it may come back from a dead-letter queue.

    Args:
        error: Type and text of the error.
        before: How often the message had been rejected before this delivery.
    """
    return f"{error}{_REJECTED}{before}"


#: The ``error`` of a row whose owner's lease ran out under ``on_abandoned="fail"``.
ABANDONED = "abandoned: the worker that ran it died or lost its lease"

#: The ``error`` of a row that an operator emptied with ``forget``.
FORGOTTEN = "forgotten"

#: The ``error`` of a message that waited, or lost its owner, while the guard was off: it may have run without leaving a trace.
MAY_HAVE_RUN = "unguarded: it waited while the guard was off, and may have run"

#: How ``error`` begins for a message that Celery discarded. Workers remember its Celery id for hours.
DISCARDED = ("revoked", "expired")


class ProcessedStatus(StrEnum):
    """How a message ended.

    ``SUCCESS`` with ``Status.PROCESSING`` is a recovery point: the body ran and its result is stored, but its callbacks
    may not be sent yet.
    """

    SUCCESS = "success"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class MessageKey:
    """The primary key of the queue log: a message id belongs to one task."""

    message_id: str
    task_name: str

    def __str__(self) -> str:
        return f"{self.task_name}[{self.message_id}]"


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message about to be recorded.

    Attributes:
        key: Its message id and task name.
        task_id: The Celery task id it is sent under.
        queue: Its routing key, if known.
        fingerprint: SHA-256 hex digest of the canonical arguments; ``None`` when they are not compared.
        attempt: Celery's ``retries`` of the delivery it waits for; 0 for the first.
        delay: Seconds until it may run (countdown, ETA); ``None`` for at once. Negative for an ETA that has passed.
        published: Whether the caller hands it to the broker at once; ``False`` for a row of the outbox, which is published after its
            transaction has committed.
        publish_within: Seconds in which only the recorder publishes a row of the outbox, before the relay may; ``None`` lets the
            relay publish it from the beginning.
        message: Encoded arguments and options, so that it can be published again.
        original_task_id: For a delivery, the Celery id first sent under its message id, if known to be another.
    """

    key: MessageKey
    task_id: str
    queue: str | None = None
    fingerprint: str | None = None
    attempt: int = 0
    delay: float | None = None
    published: bool = True
    publish_within: float | None = None
    message: bytes | None = None
    original_task_id: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no store can keep, before any store is asked.

        Raises:
            ConfigurationError: No store can keep an id, a name or the attempt.
        """
        check_text("message_id", self.key.message_id)
        check_text("the name of the task", self.key.task_name)
        check_text("task_id", self.task_id)
        if self.queue is not None:
            check_text("the routing key", self.queue)
        if self.fingerprint is not None:
            check_text("the fingerprint", self.fingerprint, longest=FINGERPRINT)
        check_number("retries", self.attempt)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the queue log as the store read it at ``read_at``; the page "The table" explains each column."""

    key: MessageKey
    status: Status
    processed_status: ProcessedStatus | None
    created_timestamp: datetime
    processed_timestamp: datetime | None
    task_id: str
    queue: str | None
    fingerprint: str | None
    attempt: int
    token: int
    worker: str | None
    lease_expires_at: datetime | None
    available_at: datetime | None
    published_at: datetime | None
    expires_at: datetime | None
    duplicates: int
    message: bytes | None
    result: bytes | None
    error: str | None
    #: The store's clock when the row was read. Ages and expiries are judged against it, never against the caller's clock.
    read_at: datetime
    #: How often a dead owner's claim on this attempt was taken over; limits how often a message may kill its worker.
    takeovers: int = 0
    #: The Celery id of the last delivery that claimed, whose callbacks and result Celery sends; ``task_id`` is the first sent.
    ran_task_id: str | None = None
    steps: bytes | None = None

    @property
    def expired(self) -> bool:
        """Whether the id is free again for calls (``unique_for`` passed)."""
        done = self.status is Status.DONE
        return done and self.expires_at is not None and self.expires_at <= self.read_at

    def is_free_for(self, task_id: str, original_task_id: str | None = None) -> bool:
        """Return whether the id has expired and the delivery is not a copy of the message that ended here, which never runs again.

        After ``forget``, any copy counts as new.

        Args:
            task_id: The Celery id that the delivery was sent under.
            original_task_id: The first Celery id, by its header, if that is another.
        """
        # `ran_task_id` is null if the message never ran.
        original = task_id if original_task_id is None else original_task_id
        if self.error == FORGOTTEN:
            return self.expired
        return self.expired and not {task_id, original} & {self.task_id, self.ran_task_id}

    @property
    def never_began(self) -> bool:
        """Whether it was revoked or expired before its body ever began. Its id is free for calls; a copy of it never runs."""
        failed = self.status is Status.DONE and self.processed_status is ProcessedStatus.FAILURE
        return failed and self.worker is None and (self.error or "").startswith(DISCARDED)

    @property
    def forbidden(self) -> bool:
        """Whether a running message must not run again if its owner dies; ``error`` says why. See ``Store.forbid``."""
        running = self.status is Status.PROCESSING and self.processed_status is None
        return running and self.error not in (None, MAY_HAVE_RUN)

    @property
    def may_have_run(self) -> bool:
        """Whether it may have run while the guard was off; see ``Store.doubt``. Its next claim forgets that."""
        return self.status is not Status.DONE and self.error == MAY_HAVE_RUN

    @property
    def rejected_before(self) -> int | None:
        """How often the message had been rejected before the rejection that ended it; ``None`` if it ended otherwise."""
        if self.error is None or self.processed_status is not ProcessedStatus.FAILURE:
            return None
        _, mark, before = self.error.rpartition(_REJECTED)
        return int(before) if mark and before.isdecimal() else None

    @property
    def lease_left(self) -> float:
        """Seconds until the lease runs out; 0 or less if it has, or if there is none.

        The lease of a pending row is the right to publish it, not to run it.
        """
        return 0.0 if self.lease_expires_at is None else (self.lease_expires_at - self.read_at).total_seconds()

    @property
    def available_in(self) -> float:
        """Seconds until the message may run; negative if it may already, 0 if it never had to wait."""
        return 0.0 if self.available_at is None else (self.available_at - self.read_at).total_seconds()

    @property
    def waiting_since(self) -> datetime:
        """The time from which the message could have been consumed: the latest of its recording, publication and ETA."""
        return max(t for t in (self.created_timestamp, self.published_at, self.available_at) if t is not None)


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to finish one run of a message. Its token fences every write."""

    key: MessageKey
    token: int


@dataclass(frozen=True, slots=True)
class Owner:
    """The holder of a message, by its worker's label: for a parent process that ends a dead child's claim without its token."""

    key: MessageKey
    worker: str


#: What fences a write after a claim.
Holder = Claim | Owner


@dataclass(frozen=True, slots=True)
class Inserted:
    """The message was new, or its id was free again. It is now pending, and its producer publishes it."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The id is taken; nothing was written."""

    row: Row


@dataclass(frozen=True, slots=True)
class Claimed:
    """The caller holds the message until the lease runs out."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class NotClaimed:
    """The message could not be claimed as asked; nothing was written."""

    row: Row


@dataclass(frozen=True, slots=True)
class RowFilter:
    """Which rows to list: those that meet all conditions; ``None`` leaves one out.

    Attributes:
        message_id: Exact id, or a pattern with ``*`` and ``?``.
        task_name: Exact task name, or a pattern with ``*`` and ``?``.
        status: Only rows in this status.
        processed_status: Only rows that ended this way.
        queue: Exact name of the queue they were routed to, or a pattern with ``*`` and ``?``.
        error: Exact text of the error, or a pattern with ``*`` and ``?``.
        older_than: Only rows at least this old, in seconds since the message was done, or since it was recorded if it is not.
        newer_than: Only rows younger than this, in the same seconds.
        limit: The most rows to list, newest recorded first; > 0.
        oldest_first: Whether to list the oldest recorded first instead.
    """

    message_id: str | None = None
    task_name: str | None = None
    status: Status | None = None
    processed_status: ProcessedStatus | None = None
    queue: str | None = None
    error: str | None = None
    older_than: float | None = None
    newer_than: float | None = None
    limit: int = 100
    oldest_first: bool = False


@dataclass(frozen=True, slots=True)
class TaskCount:
    """How many rows of one task have one status, and how many copies of them were skipped."""

    task_name: str
    status: Status
    processed_status: ProcessedStatus | None
    rows: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class LogHealth:
    """The state of the queue log at ``read_at``: what is waiting, and whether it is recovered and purged.

    Attributes:
        read_at: The store's clock.
        last_due: The latest due time of the broker's messages that are not due yet; ``None`` if there is none.
        lapsed_since: When the oldest lapsed lease ran out, of messages not published again since.
        unsent_since: When the oldest message was recorded that was never handed to the broker and that no process is publishing.
        done_since: When the oldest message that may be purged was done.
    """

    read_at: datetime
    last_due: datetime | None = None
    lapsed_since: datetime | None = None
    unsent_since: datetime | None = None
    done_since: datetime | None = None
