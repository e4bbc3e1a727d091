"""Run the body of a delivery, as the guard's ``__call__`` does it, and have its end written."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded

from celery_idempotent.core.backoff import Backoff
from celery_idempotent.core.store_retry import ask_until_answered
from celery_idempotent.errors import ConfigurationError, StoreError
from celery_idempotent.producer.box import within
from celery_idempotent.worker.body_end import BodyEnd, Failed, Retried, end_by_error, end_by_value
from celery_idempotent.worker.delivery import describe
from celery_idempotent.worker.run import Passage, Run
from celery_idempotent.worker.run_state import Checkpointed, Claimed, HandedOn, Replayed, Unguarded
from celery_idempotent.worker.unit_of_work import RUNS, NotCommittedError, Setback, UnitOfWork

__all__ = ["perform"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")

#: Before an atomic body is run again.
_BACKOFF = Backoff(0.1)


def perform(run: Run, body: Callable[[], T]) -> T:
    """Run the body, or return the stored result, and record how it ended.

    Raises:
        Ignore: The claim was lost, or the message goes on elsewhere: this run has no outcome.
    """
    return run.limits.without(lambda: _perform_or_replay(run, partial(run.limits.within, body)))


def _perform_or_replay(run: Run, body: Callable[[], T]) -> T:
    run.passage = Passage.CALLED
    if isinstance(run.state, (Replayed, Checkpointed)):
        return cast("T", run.state.value)
    if isinstance(run.state, Unguarded):
        return _perform_unrecorded(run, body) if run.task.idempotency.atomic else body()
    if run.claim is not None and time.monotonic() - run.asked > run.task.idempotency.lease:
        _reassert_claim(run)
    if run.task.idempotency.atomic:
        return _perform_atomically(run, body)
    with within(None):  # an eager run inside of an outbox, or of an atomic body, stands for itself
        return _perform(run, body)


def _perform_unrecorded(run: Run, body: Callable[[], T]) -> T:
    """Run the body of an atomic task that is turned off: in a transaction, without a row that would end with it."""
    unit = UnitOfWork(run.queue_log)
    try:
        with unit as run.unit, within(unit.outbox):
            if unit.begins_before_body:
                unit.open()
            value = body()
            if unit.opened:
                unit.commit(lambda _: True)
                run.publish(unit)
    finally:
        run.unit = None
    return value


def _perform_atomically(run: Run, body: Callable[[], T]) -> T:
    """Run the body in a transaction, and again in a new one if that gave way to others."""

    def flushed() -> T:
        unit = run.unit
        if unit is not None and run.waits and (setback is Setback.NOT_CONNECTED or unit.begins_before_body):
            # Not by running the body over and over: what it does elsewhere before it writes, it would do each time.
            ask_until_answered(unit.open, "begin the transaction of", run)
        elif unit is not None and unit.begins_before_body:
            unit.open()
        value = body()
        if run.unit is not None and isinstance(run.state, Claimed):
            run.unit.flush()
        return value

    longest, collided = 0.0, False
    setback: Setback | None = None
    for number in range(1, RUNS + 1):
        began = time.monotonic()
        try:
            unit = UnitOfWork(run.queue_log, contended=collided)
        except ConfigurationError as wrong:
            run.end(Failed(describe(wrong)))
            raise
        try:
            with unit as run.unit, within(unit.outbox):
                return _perform(run, flushed)
        except NotCommittedError as stopped:
            error, again = stopped.error, stopped.again and number < RUNS
            setback = unit.setback
            collided = collided or setback is Setback.COLLIDED
        finally:
            run.unit = None
        if not again:
            break
        logger.warning(
            "%s is run again, as its transaction was not committed (run %d of %d): %s", run, number, RUNS, error
        )
        longest = max(longest, time.monotonic() - began)
        time.sleep(_BACKOFF.random_pause(number))
        _before_another_run(run, longest if collided else 0.0)
    run.end(Failed(describe(error)))
    raise error


def _before_another_run(run: Run, unrenewed: float) -> None:
    """Make sure of the claim, for long enough that no renewal falls into a run that takes so many seconds.

    A renewal writes the row. Where a transaction's snapshot is fixed (``REPEATABLE READ`` and above on PostgreSQL) it could
    not complete a row that was written since, and a body longer than a third of its lease never would. What only lost its
    connection has the lease that it had: whoever takes over from a process that dies soon after waits for the end of that.
    """
    lease = run.task.idempotency.lease + 2 * unrenewed
    lost = run.write("keep a claim", lambda: run.queue_log.store.renew([run.held_claim], lease=lease))
    if lost:
        run.lose()
    run.passage, run.replacing = Passage.CALLED, False
    run.__dict__.pop("calls", None)  # it makes the same calls in the same places


def _perform(run: Run, body: Callable[[], T]) -> T:
    began = time.monotonic()
    try:
        try:
            value = body()
        finally:
            run.ran = time.monotonic() - began
    except (Retry, Ignore, Reject) as way:
        # An eager retry, or one that is raised by hand, has published nothing and handed nothing on.
        if isinstance(run.state, Claimed):
            run.end(_end_by_error(run, way))
        if not isinstance(way, Reject):
            run.stop_if_lost()
        raise
    except NotCommittedError:
        raise
    except Exception as error:
        if _ran_on(run):
            raise
        _stop_if_sent_on(run)
        if run.unit is not None:
            run.unit.note(error)  # of a framework's own connection
            if run.unit.gave_way is not None:  # whatever the body made of it
                raise NotCommittedError(error, again=True) from error
            # A signal may have struck in the middle of an answer.
            run.unit.roll_back(broken=isinstance(error, SoftTimeLimitExceeded))
        run.end(_end_by_error(run, error))
        raise
    if _ran_on(run):
        return value
    _stop_if_sent_on(run)
    end = end_by_value(value, eager=run.request.is_eager)
    run.end(end)
    if isinstance(end, Retried):  # `apply` goes on with the next attempt, after which the callbacks are sent
        run.request.callbacks = run.request.chain = None
    return value


def _end_by_error(run: Run, error: BaseException) -> BodyEnd:
    return end_by_error(error, replacing=run.replacing, rejections=run.header.rejected)


def _reassert_claim(run: Run) -> None:
    """Renew the claim after the process slept for longer than the lease before the body: somebody else may have run it since."""
    try:
        lost = run.queue_log.store.renew([run.held_claim], lease=run.task.idempotency.lease)
    except StoreError as error:
        logger.warning("%s runs although its claim may be lost, the store gives no answer: %s", run, error)
        return
    if lost:
        run.lose()


def _ran_on(run: Run) -> bool:
    """Whether the body replaced itself by itself eagerly: that run is over and has written the outcome of both."""
    return isinstance(run.state, HandedOn) and bool(run.request.is_eager)


def _stop_if_sent_on(run: Run) -> None:
    """``retry(throw=False)``: the body went on after it, but the retry is what decides."""
    if isinstance(run.state, HandedOn):
        raise Ignore(f"{run} was handed on to its next attempt")
    run.stop_if_lost()
