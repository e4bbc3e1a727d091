"""Messages and rows that the contract's tests begin with, and how they wait."""

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
    """Return a message as a producer sends it, with a value in every field that may have one."""
    values: dict[str, Any] = {
        "key": key,
        "task_id": "task-1",
        "queue": "celery",
        "fingerprint": "a" * 64,
        "message": b'{"args": ["o-1", 500]}',
    }
    return NewMessage(**{**values, **changes})


def read(store: Store, key: MessageKey = KEY) -> Row:
    """Return the row, which has to be there."""
    row = store.find(key)
    assert row is not None, f"{key} has no row"
    return row


def same_row(first: Row, second: Row) -> bool:
    """Return whether two rows differ in nothing but when they were read."""
    names = [field.name for field in fields(Row) if field.name != "read_at"]
    return all(getattr(first, name) == getattr(second, name) for name in names)


def try_claim(
    store: Store, message: NewMessage | None = None, *, worker: str = WORKER, lease: float = LEASE
) -> Claimed | NotClaimed:
    """Return what a claim of the message answers."""
    return store.claim(new_message() if message is None else message, worker=worker, lease=lease, grace=GRACE)


def claim(store: Store, message: NewMessage | None = None, *, worker: str = WORKER, lease: float = LEASE) -> Claim:
    """Return the claim on a message, which has to succeed."""
    answer = try_claim(store, message, worker=worker, lease=lease)
    assert isinstance(answer, Claimed), f"not claimed: {answer}"
    return answer.claim


def pending(store: Store, **changes: Any) -> Row:
    """Return a message just recorded."""
    message = new_message(**changes)
    assert store.record(message) == Inserted()
    return read(store, message.key)


def processing(store: Store, **changes: Any) -> Claim:
    """Return a message recorded and claimed."""
    message = new_message(**changes)
    assert store.record(message) == Inserted()
    return claim(store, message)


def take(store: Store, row: Row, *, worker: str = "host-b:202", lease: float = LEASE, attempt: int = 0) -> Claim | None:
    """Return the claim on a message taken over from its owner, or ``None``."""
    answer = store.take_over(row, task_id="task-2", worker=worker, lease=lease, attempt=attempt)
    return None if answer is None else answer.claim


def done(store: Store, *, unique_for: float | None = None, **changes: Any) -> Claim:
    """Return a message recorded, claimed and completed; the claim that did it."""
    held = processing(store, **changes)
    assert store.complete(held, result=b'"receipt"', unique_for=unique_for)
    return held


def expired_id(store: Store, **changes: Any) -> Claim:
    """Return a message that is done and whose id is free again; the claim that did it."""
    held = done(store, unique_for=0.001, **changes)
    wait_until(lambda: read(store, held.key).expired)
    return held


def wait_until(condition: Callable[[], bool], *, timeout: float = 10.0) -> None:
    """Ask until the answer is true; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain"
        time.sleep(0.002)


def overdue(store: Store, name: str = "order:1") -> Row:
    """Return a message whose lease ran out."""
    held = processing(store, key=MessageKey(name, "t"))
    row = read(store, held.key)
    # Or it would end in the moment of its publication, where a clock ticks in milliseconds, and not be told from one published since.
    wait_until(lambda: read(store, held.key).read_at > row.read_at)
    assert store.expire(held)
    return read(store, held.key)


def ids(rows: list[Row]) -> list[str]:
    """Return the message ids, in their order."""
    return [row.key.message_id for row in rows]
