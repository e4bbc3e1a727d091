"""Rows and messages as scripts take and give them: bytes in, :class:`~celery_idempotent.core.records.Row` out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from celery_idempotent.core.records import Claim, Holder, MessageKey, NewMessage, ProcessedStatus, Row, Status
from celery_idempotent.errors import StoreError
from celery_idempotent.stores.redis.layout import encoded

__all__ = [
    "Argument",
    "duration",
    "fence",
    "message_arguments",
    "moment",
    "optional",
    "optional_moment",
    "row_of",
]

#: What a script is given.
Argument = bytes | int

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
#: What a datetime can tell, in microseconds since 1970; an ETA beyond it is read as that.
_FIRST, _LAST = (
    (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND,
    (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND,
)


# -- what scripts are given ------------------------------------------------------------------------------------------------


def optional(value: str | bytes | None) -> bytes:
    """Return a text or bytes that may be missing: empty if it is, otherwise after a mark, because the text may be empty itself."""
    if value is None:
        return b""
    return b"=" + (value if isinstance(value, bytes) else encoded(value))


def duration(seconds: float | None) -> bytes:
    """Return a duration in microseconds; empty for none."""
    return b"" if seconds is None else b"%d" % round(seconds * 1_000_000)


def moment(value: datetime | None) -> bytes:
    """Return a moment in microseconds since 1970, as rows have it; empty for none."""
    return b"" if value is None else b"%d" % ((value - _EPOCH) // _MICROSECOND)


def fence(holder: Holder) -> tuple[bytes, bytes]:
    """Return what a write after a claim is fenced by: a column, and the value that it has to have."""
    if isinstance(holder, Claim):
        return b"token", b"%d" % holder.token
    return b"worker", encoded(holder.worker)


def message_arguments(message: NewMessage) -> tuple[bytes, ...]:
    """Return a message about to be recorded, but for its key."""
    return (
        encoded(message.task_id),
        b"%d" % message.attempt,
        duration(message.delay),
        b"1" if message.published else b"",
        duration(message.publish_within),
        optional(message.queue),
        optional(message.fingerprint),
        optional(message.message),
    )


# -- what they answer --------------------------------------------------------------------------------------------------------


def row_of(key: MessageKey, answer: Sequence[Any]) -> Row:
    """Return a row as a script tells it: the server's clock, the columns, and what is large (where it was asked for).

    Raises:
        StoreError: It is not as this library writes it.
    """
    now, columns, large = answer
    read: dict[bytes, bytes] = dict(zip(columns[::2], columns[1::2], strict=True))
    read.update(zip(large[::2], large[1::2], strict=True))
    try:
        processed = read.get(b"processed_status")
        return Row(
            key=key,
            status=Status(read[b"status"].decode()),
            processed_status=None if processed is None else ProcessedStatus(processed.decode()),
            created_timestamp=_datetime(read[b"created_timestamp"]),
            processed_timestamp=_moment(read, b"processed_timestamp"),
            task_id=read[b"task_id"].decode("utf-8", "surrogatepass"),
            queue=_text(read, b"queue"),
            fingerprint=_text(read, b"fingerprint"),
            attempt=int(read.get(b"attempt", 0)),
            token=int(read.get(b"token", 0)),
            worker=_text(read, b"worker"),
            lease_expires_at=_moment(read, b"lease_expires_at"),
            available_at=_moment(read, b"available_at"),
            published_at=_moment(read, b"published_at"),
            expires_at=_moment(read, b"expires_at"),
            duplicates=int(read.get(b"duplicates", 0)),
            message=read.get(b"message"),
            result=read.get(b"result"),
            error=_text(read, b"error"),
            read_at=_datetime(now),
            takeovers=int(read.get(b"takeovers", 0)),
            ran_task_id=_text(read, b"ran_task_id"),
            steps=read.get(b"steps"),
        )
    except (KeyError, ValueError) as error:
        raise StoreError(
            f"the queue log's row of {key.message_id!r} and {key.task_name!r} is damaged ({type(error).__name__}: {error}); "
            f"correct the row, or delete it"
        ) from None


def optional_moment(value: bytes) -> datetime | None:
    """Return a moment as a script tells it; empty for none."""
    return _datetime(value) if value else None


def _moment(read: dict[bytes, bytes], column: bytes) -> datetime | None:
    value = read.get(column)
    return None if value is None else _datetime(value)


def _datetime(microseconds: bytes) -> datetime:
    return _EPOCH + timedelta(microseconds=min(max(int(microseconds), _FIRST), _LAST))


def _text(read: dict[bytes, bytes], column: bytes) -> str | None:
    value = read.get(column)
    return None if value is None else value.decode("utf-8", "surrogatepass")
