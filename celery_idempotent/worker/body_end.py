"""How a body ended, as a value: made here from its return value, its exception or the state in Celery; written by ``Run.end``."""

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
    """The body returned.

    Attributes:
        value: The return value.
        dispatched: Whether Celery has already sent callbacks and result.
    """

    value: Any
    dispatched: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """The body raised an error, or rejected its message for good. The error is a text, for the row."""

    error: str


@dataclass(frozen=True, slots=True)
class Retried:
    """The body asked for another attempt, but the row was not handed on: in an eager run, or by raising ``Retry`` itself."""

    retry: Retry


@dataclass(frozen=True, slots=True)
class Released:
    """The body gave its message back to the broker: ``Reject(requeue=True)``."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """The body has no result of its own; the row records why."""

    note: NoResultReason


BodyEnd = Completed | Failed | Retried | Released | Ignored


def end_by_value(value: Any, *, eager: bool) -> BodyEnd:
    """Return the end of a body that returned a value."""
    # `return self.retry(throw=False)`: in a worker, it has already handed the row on.
    if eager and isinstance(value, Retry) and value.sig is not None:
        return Retried(value)
    return Completed(value)


def end_by_error(error: BaseException, *, replacing: bool, rejections: int) -> BodyEnd:
    """Return the end of a body that raised.

    Args:
        error: The exception.
        replacing: Whether it was replacing itself.
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
    """Return the end of a body that bypassed the guard, by its state in Celery.

    Args:
        state: Celery's state.
        outcome: The return value, or the exception.
        replacing: Whether the body was replacing itself.
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
