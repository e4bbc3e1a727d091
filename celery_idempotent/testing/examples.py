"""Messages and rows that the contract's tests start from, and how they wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from celery_idempotent.core.records import Claim, Claimed, Inserted, MessageKey, NewMessage, NotClaimed, Row
from celery_idempotent.core.store import Store

__all__ = [
    "GRACE",
    "KEY",
    "LEASE",
    "WORKER",
    "claim",
    "done",
    "expired_id",
    "ids",
    "new_message",
    "overdue",
    "pending",
    "processing",
    "read",
    "same_row",
    "take",
    "try_claim",
    "wait_until",
]

KEY = MessageKey("order:1", "shop.charge")
WORKER = "host-a:101"
LEASE = 60.0
GRACE = 30.0


def new_message(key: MessageKey = KEY, **changes: Any) -> NewMessage:
    """Return a message as a producer sends it, with every field set that it may set."""
    values: dict[str, Any] = {
        "key": key,
        "task_id": "task-1",
        "queue": "celery",
        "fingerprint": "a" * 64,
        "message": b'{"args": ["o-1", 500]}',
    }
    return NewMessage(**{**values, **changes})


def read(store: Store, key: MessageKey = KEY) -> Row:
    """Return the row, which must exist."""
    row = store.find(key)
    assert row is not None, f"{key} has no row"
    return row


def same_row(first: Row, second: Row) -> bool:
    """Return whether two rows are equal except for when they were read."""
    names = [field.name for field in fields(Row) if field.name != "read_at"]
    return all(getattr(first, name) == getattr(second, name) for name in names)


def try_claim(
    store: Store, message: NewMessage | None = None, *, worker: str = WORKER, lease: float = LEASE
) -> Claimed | NotClaimed:
    """Try to claim the message; return the answer."""
    return store.claim(new_message() if message is None else message, worker=worker, lease=lease, grace=GRACE)


def claim(store: Store, message: NewMessage | None = None, *, worker: str = WORKER, lease: float = LEASE) -> Claim:
    """Claim a message, which must succeed; return the claim."""
    answer = try_claim(store, message, worker=worker, lease=lease)
    assert isinstance(answer, Claimed), f"not claimed: {answer}"
    return answer.claim


def pending(store: Store, **changes: Any) -> Row:
    """Record a message; return its row."""
    message = new_message(**changes)
    assert store.record(message) == Inserted()
    return read(store, message.key)


def processing(store: Store, **changes: Any) -> Claim:
    """Record and claim a message; return the claim."""
    message = new_message(**changes)
    assert store.record(message) == Inserted()
    return claim(store, message)


def take(store: Store, row: Row, *, worker: str = "host-b:202", lease: float = LEASE, attempt: int = 0) -> Claim | None:
    """Take a message over from its owner; return the claim, or ``None``."""
    answer = store.take_over(row, task_id="task-2", worker=worker, lease=lease, attempt=attempt)
    return None if answer is None else answer.claim


def done(store: Store, *, unique_for: float | None = None, **changes: Any) -> Claim:
    """Record, claim and complete a message; return the claim."""
    held = processing(store, **changes)
    assert store.complete(held, result=b'"receipt"', unique_for=unique_for)
    return held


def expired_id(store: Store, **changes: Any) -> Claim:
    """Complete a message and wait until its id is free; return the claim."""
    held = done(store, unique_for=0.001, **changes)
    wait_until(lambda: read(store, held.key).expired)
    return held


def wait_until(condition: Callable[[], bool], *, timeout: float = 10.0) -> None:
    """Wait until the condition is true; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain"
        time.sleep(0.002)


def overdue(store: Store, name: str = "order:1") -> Row:
    """Claim a message and let its lease run out; return its row."""
    held = processing(store, key=MessageKey(name, "t"))
    row = read(store, held.key)
    # Where the clock ticks in milliseconds, a lease that ran out in the tick of its publication would count as published since.
    wait_until(lambda: read(store, held.key).read_at > row.read_at)
    assert store.expire(held)
    return read(store, held.key)


def ids(rows: list[Row]) -> list[str]:
    """Return the rows' message ids, in order."""
    return [row.key.message_id for row in rows]
