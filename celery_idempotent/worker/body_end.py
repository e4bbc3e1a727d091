"""How a body ended, as a value: read here from what it returned, what it raised, or what Celery saw of it; written by ``Run.end``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from celery import states
from celery.exceptions import Ignore, Reject, Retry

from celery_idempotent.core.records import NoResultReason, rejected
from celery_idempotent.worker.delivery import describe

__all__ = [
    "BodyEnd",
    "Completed",
    "Failed",
    "Ignored",
    "Released",
    "Retried",
    "end_as_seen",
    "end_by_error",
    "end_by_value",
]


@dataclass(frozen=True, slots=True)
class Completed:
    """It returned.

    Attributes:
        value: What.
        dispatched: Whether Celery has sent callbacks and result already.
    """

    value: Any
    dispatched: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """It raised an error, or rejected its message for good. The error is a text, for the row."""

    error: str


@dataclass(frozen=True, slots=True)
class Retried:
    """It asked for another attempt that nobody has handed the row on to: eagerly, or by an exception raised by hand."""

    retry: Retry


@dataclass(frozen=True, slots=True)
class Released:
    """It gave its message back to the broker: ``Reject(requeue=True)``."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """It has no result of its own. The row says why."""

    note: NoResultReason


BodyEnd = Completed | Failed | Retried | Released | Ignored


def end_by_value(value: Any, *, eager: bool) -> BodyEnd:
    """Return the end of a body that returned a value."""
    # `return self.retry(throw=False)`: a worker's has handed the row on by then.
    if eager and isinstance(value, Retry) and value.sig is not None:
        return Retried(value)
    return Completed(value)


def end_by_error(error: BaseException, *, replacing: bool, rejections: int) -> BodyEnd:
    """Return the end of a body that raised.

    Args:
        error: What.
        replacing: Whether it was about to replace itself.
        rejections: How often its message was rejected before.
    """
    if isinstance(error, Retry):
        return Retried(error)
    if isinstance(error, Ignore):
        return _ignored(replacing)
    if isinstance(error, Reject):
        return _rejected(error, rejections)
    return Failed(describe(error))


def end_as_seen(state: str, outcome: Any, *, replacing: bool, rejections: int) -> BodyEnd:
    """Return the end of a body that ran past the guard, by the state that Celery gave it.

    Args:
        state: Celery's.
        outcome: The return value, or the exception.
        replacing: Whether the body was about to replace itself.
        rejections: How often its message was rejected before.
    """
    match state:
        case states.SUCCESS:
            return Completed(outcome, dispatched=True)
        case states.RETRY:
            return Retried(outcome)
        case states.IGNORED:
            return _ignored(replacing)
        case states.REJECTED:
            return _rejected(outcome, rejections)
        case _:
            return Failed(describe(outcome))


def _ignored(replacing: bool) -> Ignored:
    return Ignored(NoResultReason.REPLACED if replacing else NoResultReason.IGNORED)


def _rejected(reject: Reject, rejections: int) -> Released | Failed:
    return Released() if reject.requeue else Failed(rejected(describe(reject), rejections))
