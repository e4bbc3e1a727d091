"""The two decisions: what a producer does with a call, and what a consumer does with a delivered message.

Pure functions of the row, the call or the delivery, and the task's policy. They know neither Celery nor a database. The caller
carries the answer out with one compare-and-set of the store, and asks again if the row changed meanwhile. The branches
stand in the order of the tables in ``docs/explanation/decisions.md``, and the tests repeat their words.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, assert_never

from celery_idempotent.core.records import NoResultReason, ProcessedStatus, Row, Status

__all__ = [
    "AVAILABLE_GRACE",
    "MAX_TAKEOVERS",
    "Call",
    "CallAction",
    "CallPolicy",
    "Delivery",
    "DeliveryAction",
    "DeliveryDecision",
    "DeliveryPolicy",
    "decide_call",
    "decide_delivery",
]

#: Seconds after ``available_at`` at which a copy with fewer retries than the row waits for may run in the retry's place:
#: the retry's own message is given this long to arrive first.
AVAILABLE_GRACE = 30.0

#: How many owners one attempt of a message may lose before it is taken for poison and abandoned.
MAX_TAKEOVERS = 5


class CallAction(StrEnum):
    """What a producer does with a call."""

    RECORD = "record"  # record, publish
    RETURN_FIRST = "return_first"  # publish nothing; the first AsyncResult, marked as a duplicate
    RAISE_DUPLICATE = "raise_duplicate"
    PUBLISH_COPY = "publish_copy"  # publish under its own task id; the consumer replays or holds
    PUBLISH_AGAIN = "publish_again"  # publish once more under the first task id
    RESUBMIT = "resubmit"  # back to pending, publish
    RAISE_MISMATCH = "raise_mismatch"
    TRANSITION = "transition"  # the running task's own retry or replacement: no check


@dataclass(frozen=True, slots=True)
class Call:
    """A call of ``apply_async``.

    Attributes:
        fingerprint: SHA-256 of its canonical arguments; ``None`` when they are not compared.
        canvas: Whether something else waits on this call: it is part of a chain, group or chord, or has ``link`` or
            ``link_error``.
        own: Whether the running task sends its own message on (retry, replace, hold).
        repeated: Whether the row is what an earlier run of the body that makes this call has made of it.
    """

    fingerprint: str | None = None
    canvas: bool = False
    own: bool = False
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class CallPolicy:
    """The options that a producer's decision depends on.

    Attributes:
        on_duplicate: What a caller learns of a duplicate.
        resubmit_failed: Whether a failed message may be sent again under its id.
        lost_after: Seconds for which a row may stay pending before its publication is doubted; > 0.
    """

    on_duplicate: Literal["skip", "raise"] = "skip"
    resubmit_failed: bool = False
    lost_after: float = 300.0


def decide_call(row: Row | None, call: Call, policy: CallPolicy) -> CallAction:
    """Decide what a producer does with a call.

    Args:
        row: The row that has the call's message id, or ``None``.
        call: The call.
        policy: The task's options.

    Returns:
        What to do; nothing has been done.
    """
    # the running task's own retry, replace or hold
    if call.own:
        return CallAction.TRANSITION
    # absent, or `expires_at` passed
    if row is None or row.expired:
        return CallAction.RECORD
    # done/failure, revoked or expired before its body ever began
    if row.never_began and not call.repeated:
        return CallAction.RESUBMIT
    # there, other fingerprint
    if _differ(row.fingerprint, call.fingerprint):
        return CallAction.RAISE_MISMATCH
    # the same call, made by an earlier run of the body
    if call.repeated:
        return _decide_repeated(row, call)
    # done/failure with `resubmit_failed`
    if policy.resubmit_failed and row.status is Status.DONE and row.processed_status is ProcessedStatus.FAILURE:
        return CallAction.RESUBMIT
    # there, and the call is part of a chain, group or chord, or has `link` / `link_error`
    if call.canvas:
        return CallAction.PUBLISH_COPY
    # `pending` for longer than a few minutes, and it cannot have run while the guard was off
    late = (row.read_at - row.waiting_since).total_seconds() > policy.lost_after
    if row.status is Status.PENDING and late and not row.may_have_run:
        return CallAction.PUBLISH_AGAIN
    # there, same fingerprint, nothing else waits on this call
    return CallAction.RETURN_FIRST if policy.on_duplicate == "skip" else CallAction.RAISE_DUPLICATE


def _decide_repeated(row: Row, call: Call) -> CallAction:
    # the same call, in a canvas that this run has built again
    if call.canvas:
        return CallAction.PUBLISH_COPY
    # the same call, never claimed: the run that recorded it may have ended before it was published
    if row.status is Status.PENDING and row.worker is None and not row.may_have_run:
        return CallAction.PUBLISH_AGAIN
    return CallAction.RETURN_FIRST


class DeliveryAction(StrEnum):
    """What a consumer does with a delivered message."""

    REFUSE = "refuse"  # the error that says why no store can keep it ends it
    CLAIM = "claim"  # claim, run
    HOLD = "hold"  # publish a delayed copy, then ack
    TAKE_OVER = "take_over"  # token + 1, run
    ASK = "ask"  # the task says whether to run it, to fail it, or with which result it was done
    ABANDON = "abandon"  # done/failure, reason `abandoned`
    CANCEL = "cancel"  # done/failure, since it was revoked or has expired
    FORBID = "forbid"  # the row notes that it is not to run again
    TAKE_OVER_AND_REPLAY = "take_over_and_replay"  # token + 1, return the stored result without running the body
    SKIP = "skip"  # ack, nothing else
    REPLAY = "replay"  # return the stored result without running the body
    RAISE_FAILED = "raise_failed"  # AlreadyFailedError with the first run's error
    RAISE_PROCESSING = "raise_processing"
    RAISE_MISMATCH = "raise_mismatch"


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivered message.

    Attributes:
        task_id: Its Celery task id.
        retries: Celery's retry count in it.
        original_task_id: The Celery id that was first sent under its message id, if that is known to be another.
        fingerprint: SHA-256 of its canonical arguments; ``None`` when they are not compared.
        discarded: Why Celery discards it without running it: it was revoked, or has expired. ``None`` when it does not.
        rejected: How often it was rejected before, by RabbitMQ's count in ``x-death``.
        awaited: Whether its result is kept (``ignore_result`` is off).
        canvas: Whether callbacks, a chain, a group or a chord wait on it.
        result_ready: Whether the result backend already has its final state; only looked at when the row is done.
        callbacks_pending: Whether one of its errbacks is known to be unsent; only looked at if it failed.
        storable: Whether a store can keep its ids, its headers and its numbers.
        later: Whether it is a later call under a Celery id that was sent before, and its callers still wait.
    """

    task_id: str
    retries: int = 0
    original_task_id: str | None = None
    fingerprint: str | None = None
    discarded: str | None = None
    rejected: int = 0
    awaited: bool = True
    canvas: bool = False
    result_ready: bool = False
    callbacks_pending: bool = False
    storable: bool = True
    later: bool = False


@dataclass(frozen=True, slots=True)
class DeliveryPolicy:
    """The options that a consumer's decision depends on.

    Attributes:
        on_processing: What happens to a copy while its owner lives.
        on_abandoned: What happens to a message whose owner's lease ran out; ``ask`` if the task decides.
        grace: See :data:`AVAILABLE_GRACE`.
        max_takeovers: See :data:`MAX_TAKEOVERS`.
    """

    on_processing: Literal["hold", "skip", "raise"] = "hold"
    on_abandoned: Literal["rerun", "fail", "ask"] = "rerun"
    grace: float = AVAILABLE_GRACE
    max_takeovers: int = MAX_TAKEOVERS


@dataclass(frozen=True, slots=True)
class DeliveryDecision:
    """What to do, and for ``HOLD`` how long: seconds until the row may have moved, before jitter and the broker's cap."""

    action: DeliveryAction
    delay: float = 0.0


def decide_delivery(row: Row | None, delivery: Delivery, policy: DeliveryPolicy) -> DeliveryDecision:
    """Decide what a consumer does with a delivered message.

    Args:
        row: The row of the message, or ``None``.
        delivery: The delivery.
        policy: The task's options.

    Returns:
        What to do; nothing has been done.
    """
    # (before all) an id, header or number that no store can keep
    if not delivery.storable:
        return DeliveryDecision(DeliveryAction.REFUSE)
    # absent, or done, `expires_at` passed, and this is no copy of what ended
    if row is None or row.is_free_for(delivery.task_id, delivery.original_task_id):
        return DeliveryDecision(DeliveryAction.CLAIM)
    # same id, other fingerprint
    if _differ(row.fingerprint, delivery.fingerprint):
        return DeliveryDecision(DeliveryAction.RAISE_MISMATCH)
    # pending or processing, and a later call under the same Celery id
    if delivery.later and row.status is not Status.DONE:
        return DeliveryDecision(DeliveryAction.HOLD, max(row.lease_left, row.available_in, 0.0) + policy.grace)
    match row.status:
        case Status.PENDING:
            # pending, and the delivery was revoked or has expired
            if delivery.discarded is not None:
                return DeliveryDecision(
                    DeliveryAction.CANCEL if delivery.task_id == row.task_id else DeliveryAction.SKIP
                )
            # pending, `retries >= attempt` or `available_at` passed by a grace
            waited = row.available_at is not None and row.available_in <= -policy.grace
            if delivery.retries >= row.attempt or waited:
                return DeliveryDecision(DeliveryAction.CLAIM)
            # pending, `retries < attempt` (an old copy of a retried message)
            return DeliveryDecision(DeliveryAction.HOLD, max(row.available_in, 0.0) + policy.grace)
        case Status.PROCESSING:
            return _decide_processing(row, delivery, policy)
        case Status.DONE:
            return DeliveryDecision(_decide_done(row, delivery))
        case _:  # pragma: no cover - the type checker proves it away
            assert_never(row.status)


def _decide_processing(row: Row, delivery: Delivery, policy: DeliveryPolicy) -> DeliveryDecision:
    # Only the first id counts: revoking a copy does not revoke the message itself.
    discarded = delivery.discarded is not None
    if discarded and delivery.task_id != row.task_id:
        return DeliveryDecision(DeliveryAction.SKIP)
    # processing, lease live, and the delivery was revoked or has expired
    if discarded and row.lease_left > 0:
        return DeliveryDecision(DeliveryAction.FORBID)
    # processing, lease live, another delivery
    if row.lease_left > 0:
        match policy.on_processing:
            case "hold":
                return DeliveryDecision(DeliveryAction.HOLD, row.lease_left)
            case "skip":
                return DeliveryDecision(DeliveryAction.SKIP)
            case "raise":
                return DeliveryDecision(DeliveryAction.RAISE_PROCESSING, row.lease_left)
            case _:  # pragma: no cover - the type checker proves it away
                assert_never(policy.on_processing)
    # processing, lease expired, taken over too often before (a poison message)
    if row.takeovers >= policy.max_takeovers:
        return DeliveryDecision(DeliveryAction.ABANDON)
    # (processing, success), lease expired
    if row.processed_status is ProcessedStatus.SUCCESS:
        return DeliveryDecision(DeliveryAction.TAKE_OVER_AND_REPLAY)
    # processing, lease expired, and the delivery was revoked or has expired, or one before it
    if discarded or row.forbidden:
        return DeliveryDecision(DeliveryAction.CANCEL)
    # processing, lease expired, `on_abandoned="rerun"`
    if policy.on_abandoned == "rerun":
        return DeliveryDecision(DeliveryAction.TAKE_OVER)
    # processing, lease expired, `on_abandoned` is a callable
    if policy.on_abandoned == "ask":
        return DeliveryDecision(DeliveryAction.ASK)
    # processing, lease expired, `"fail"`
    return DeliveryDecision(DeliveryAction.ABANDON)


def _decide_done(row: Row, delivery: Delivery) -> DeliveryAction:
    # Whether it is this Celery id under which the body ran, and callbacks and result were sent.
    ran = delivery.task_id == row.ran_task_id and not delivery.later
    failed = row.processed_status is ProcessedStatus.FAILURE
    # done/failure by `Reject(requeue=False)`, and the delivery's `x-death` count for `rejected` is higher than the row's
    if row.rejected_before is not None and delivery.rejected > row.rejected_before:
        return DeliveryAction.CLAIM
    # done/failure, and an errback waits on it that was not sent yet
    if failed and delivery.callbacks_pending:
        return DeliveryAction.RAISE_FAILED
    # done, this task id's result is ready, or results are ignored
    waits = delivery.awaited or (delivery.canvas and not ran)
    if not waits or (delivery.awaited and delivery.result_ready):
        return DeliveryAction.SKIP
    # done/failure, another task id waits on this message_id (or this one's failure never reached the backend)
    if failed:
        return DeliveryAction.RAISE_FAILED
    # done after its own callbacks: `done` is written after they and the result were sent. So a missing result
    # has expired, and a replay would send the callbacks twice
    if ran and delivery.canvas:
        return DeliveryAction.SKIP
    # done without a result (ignored, replaced): a task that was ignored has none to give, and one that was replaced is
    # answered under its own task id by its replacement
    if row.error == NoResultReason.IGNORED or (row.error == NoResultReason.REPLACED and ran):
        return DeliveryAction.SKIP
    # done, another task id waits on this message_id, or the result never reached the backend
    return DeliveryAction.REPLAY


def _differ(first: str | None, second: str | None) -> bool:
    """Return whether two fingerprints are both known and not the same."""
    return first is not None and second is not None and first != second
