"""The records that the queue log holds and that its store answers with: plain and frozen.

Nothing here knows Celery or a database. Times are timezone-aware UTC, taken from the store's clock; durations are seconds.
"""

# Longer than most: every record that crosses the port, and nothing else.

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from celery_idempotent.core.storable import FINGERPRINT, check_number, check_text

__all__ = [
    "ABANDONED",
    "DISCARDED",
    "FORGOTTEN",
    "Change",
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
    """Where a message stands."""

    PENDING = "pending"
    PROCESSING = "processing"
    DONE = "done"


class NoResultReason(StrEnum):
    """Why a message that succeeded has no result to replay; kept in ``error``."""

    IGNORED = "ignored"  # the body raised Ignore
    BROADCAST = "broadcast"  # it was published to a fanout exchange; each worker has a row of its own
    REPLACED = "replaced"  # the body replaced itself, and another task answers under its Celery id
    UNKEPT = "unkept"  # the store did not take the result; the result backend may have it


#: How ``error`` ends of what a body rejected, before the number of rejections that its delivery had seen.
_REJECTED = "; rejected before: "


def rejected(error: str, before: int) -> str:
    """Return what is kept in ``error`` of a message that its body rejected, so that it may come back dead-lettered.

    Args:
        error: Type and text of the error.
        before: How often the message had been rejected when it was delivered.
    """
    return f"{error}{_REJECTED}{before}"


#: Why a row failed whose owner's lease ran out under ``on_abandoned="fail"``.
ABANDONED = "abandoned: the worker that ran it died or lost its lease"

#: What is left in ``error`` of a row that an operator had forgotten.
FORGOTTEN = "forgotten"

#: How the error of a message begins that Celery discarded. Workers remember its Celery id for hours.
DISCARDED = ("revoked", "expired")


class ProcessedStatus(StrEnum):
    """How a message ended.

    ``SUCCESS`` with ``Status.PROCESSING`` is a recovery point: the body ran and its result is stored, its callbacks are
    not yet known to be dispatched.
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
        queue: Where it is routed, if known.
        fingerprint: SHA-256 hex digest of the canonical arguments; ``None`` when they are not compared.
        attempt: Celery's ``retries`` of the delivery it waits for; 0 for the first.
        delay: Seconds until it may run (countdown, ETA); ``None`` for at once. May be negative for an ETA that passed.
        published: Whether the caller hands it to the broker at once; ``False`` for a row of the outbox, which is published once its
            transaction has committed.
        publish_within: Seconds for which a row of the outbox is its recorder's to publish, before the relay may; ``None`` leaves
            it to the relay from the beginning.
        message: Encoded arguments and options, so that it can be published again.
        original_task_id: Of a delivery, the Celery id that was first sent under its message id, if that is known to be another.
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
        """Refuse what no store can keep, so that no store is asked to.

        Raises:
            ConfigurationError: An id, a name or the attempt is such.
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
    """A row of the queue log as the store read it at ``read_at``; the page "The table" tells of each column."""

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
    #: The store's clock when the row was read: every age and every expiry is judged against it, never the caller's clock.
    read_at: datetime
    #: How often a dead owner's claim on this attempt was taken over; it bounds how often a message may kill its worker.
    takeovers: int = 0
    #: The Celery id of the delivery that claimed last, whose callbacks and result Celery sends; ``task_id`` is the first sent.
    ran_task_id: str | None = None

    @property
    def expired(self) -> bool:
        """Whether the id is free again for calls (``unique_for`` passed)."""
        done = self.status is Status.DONE
        return done and self.expires_at is not None and self.expires_at <= self.read_at

    def is_free_for(self, task_id: str, original_task_id: str | None = None) -> bool:
        """Return whether the id is free again for a delivery: it is no copy of the message that ended here, which never runs again.

        What an operator had forgotten has left no trace: any copy of it is new.

        Args:
            task_id: The Celery id that the delivery was sent under.
            original_task_id: The one that its header says was first, if that is another.
        """
        # `ran_task_id` is null when it never ran, and `original_task_id` when it is not known.
        original = task_id if original_task_id is None else original_task_id
        if self.error == FORGOTTEN:
            return self.expired
        return self.expired and not {task_id, original} & {self.task_id, self.ran_task_id}

    @property
    def never_began(self) -> bool:
        """Whether it was revoked, or expired, before its body ever began: its id is free for calls, and a copy of it never runs."""
        failed = self.status is Status.DONE and self.processed_status is ProcessedStatus.FAILURE
        return failed and self.worker is None and (self.error or "").startswith(DISCARDED)

    @property
    def forbidden(self) -> bool:
        """Whether a running message is not to run again if its owner dies; ``error`` says why. See ``Store.forbid``."""
        return self.status is Status.PROCESSING and self.processed_status is None and self.error is not None

    @property
    def rejected_before(self) -> int | None:
        """How often a message had been rejected when the body rejected it that ended here; ``None`` if it ended otherwise."""
        if self.error is None or self.processed_status is not ProcessedStatus.FAILURE:
            return None
        _, mark, before = self.error.rpartition(_REJECTED)
        return int(before) if mark and before.isdecimal() else None

    @property
    def lease_left(self) -> float:
        """Seconds until the lease runs out; 0 or less once it has, or when there is none.

        Of a pending row it is the right to publish it, not to run it.
        """
        return 0.0 if self.lease_expires_at is None else (self.lease_expires_at - self.read_at).total_seconds()

    @property
    def available_in(self) -> float:
        """Seconds until the message may run; negative once it may, 0 when it never had to wait."""
        return 0.0 if self.available_at is None else (self.available_at - self.read_at).total_seconds()

    @property
    def waiting_since(self) -> datetime:
        """Since when this row could have been consumed: the latest of its recording, its publication and its ETA."""
        return max(t for t in (self.created_timestamp, self.published_at, self.available_at) if t is not None)


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to finish one run of a message: every write is fenced by its token."""

    key: MessageKey
    token: int


@dataclass(frozen=True, slots=True)
class Owner:
    """The holder of a message, named by its worker: for a parent process that ends a dead child's claim and lacks its token."""

    key: MessageKey
    worker: str


#: What a write after a claim is fenced by.
Holder = Claim | Owner


@dataclass(frozen=True, slots=True)
class Inserted:
    """The message was not there, or its id was free again: it is now pending, and its producer publishes it."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The id is taken; nothing was written."""

    row: Row


@dataclass(frozen=True, slots=True)
class Claimed:
    """The message is this caller's until the lease runs out."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class NotClaimed:
    """The message could not be claimed as asked; nothing was written."""

    row: Row


@dataclass(frozen=True, slots=True)
class RowFilter:
    """Which rows to list. Conditions are joined by *and*; ``None`` leaves one out.

    Attributes:
        message_id: Exact id, or a pattern with ``*`` and ``?``.
        task_name: Exact task name, or a pattern with ``*`` and ``?``.
        status: Only rows in this status.
        processed_status: Only rows that ended so.
        queue: Exact name of the queue they were routed to, or a pattern with ``*`` and ``?``.
        error: Exact text of the error, or a pattern with ``*`` and ``?``.
        older_than: Only rows of at least this age in seconds: since the message was done, or if it is not, since it was recorded.
        newer_than: Only rows of less than this age in seconds.
        limit: At most so many rows, newest first; > 0.
        oldest_first: Whether the oldest come first instead. Either way by when they were recorded.
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
    """How many rows of one task stand where, and how many copies of them were skipped."""

    task_name: str
    status: Status
    processed_status: ProcessedStatus | None
    rows: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class LogHealth:
    """How the queue log stands at ``read_at``: what is waiting, and whether it is recovered and purged.

    Attributes:
        read_at: The store's clock.
        last_due: When the last of the messages is due that the broker has and that are not due yet; ``None`` when there is none.
        lapsed_since: When the first lease ran out whose message was not published again since.
        unsent_since: When the oldest message was recorded that was never handed to the broker, and that no process is publishing.
        done_since: When the oldest message that may be purged was done.
    """

    read_at: datetime
    last_due: datetime | None = None
    lapsed_since: datetime | None = None
    unsent_since: datetime | None = None
    done_since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """A change that takes the store's schema to this version.

    Attributes:
        what: What it does, for people.
        statement: The SQL; empty where the store has none.
        alters: Whether it changes what is there already, rather than make what is missing altogether.
    """

    what: str
    statement: str = ""
    alters: bool = True
