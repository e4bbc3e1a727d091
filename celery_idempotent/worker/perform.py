"""Run the body of a delivery, for the guard's ``__call__``, and write how it ended."""

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
from celery_idempotent.worker.transaction_watch import Setback
from celery_idempotent.worker.unit_of_work import RUNS, NotCommittedError, UnitOfWork

__all__ = ["perform"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")

#: The longest pauses before an atomic body is run again.
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
    with within(None):  # an eager run does not use the outbox or the atomic body around it
        return _perform(run, body)


def _perform_unrecorded(run: Run, body: Callable[[], T]) -> T:
    """Run the body of an atomic task whose guard is off: in a transaction, without a row."""
    unit = UnitOfWork(run.queue_log)
    try:
        with unit as run.unit, within(unit.outbox):
            if unit.begins_before_body:
                unit.open()
            try:
                value = body()
            except Ignore:  # such as a replacement: it commits, as with the guard
                _commit(run, unit)
                raise
            _commit(run, unit)
    finally:
        run.unit = None
    return value


def _commit(run: Run, unit: UnitOfWork) -> None:
    if unit.opened:
        unit.commit(lambda _: True)
        run.publish(unit)


def _perform_atomically(run: Run, body: Callable[[], T]) -> T:
    """Run the body in a transaction, and again in a new one if the database aborted the first."""

    def flushed() -> T:
        unit = run.unit
        if unit is not None and run.waits and (setback is Setback.NOT_CONNECTED or unit.begins_before_body):
            # Wait here instead of running the body repeatedly: each run would repeat what it does elsewhere before it writes.
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
            setback = unit.watch.setback
            collided = collided or setback is Setback.COLLIDED
        finally:
            run.unit = None
        if not again:
            break
        logger.warning(
            "%s is run again, because its transaction was not committed (run %d of %d): %s", run, number, RUNS, error
        )
        longest = max(longest, time.monotonic() - began)
        time.sleep(_BACKOFF.random_pause(number))
        _before_another_run(run, longest if collided else 0.0)
    run.end(Failed(describe(error)))
    raise error


def _before_another_run(run: Run, unrenewed: float) -> None:
    """Renew the claim for long enough that a run of ``unrenewed`` seconds needs no renewal.

    A renewal writes the row. A transaction with a fixed snapshot (``REPEATABLE READ`` and above on PostgreSQL) cannot complete a row
    that was written since, so a body longer than a third of its lease would never commit. After a lost connection, ``unrenewed`` is
    0: a longer lease would only delay a takeover, should this process die.
    """
    lease = run.task.idempotency.lease + 2 * unrenewed
    lost = run.write("keep a claim", lambda: run.queue_log.store.renew([run.held_claim], lease=lease))
    if lost:
        run.lose()
    run.passage, run.replacing = Passage.CALLED, False
    for name in ("calls", "steps"):
        run.__dict__.pop(name, None)  # count anew, since it makes the same calls


def _perform(run: Run, body: Callable[[], T]) -> T:
    began = time.monotonic()
    try:
        try:
            value = body()
        finally:
            run.ran = time.monotonic() - began
    except (Retry, Ignore, Reject) as signal:
        # An eager retry, or a Retry that the body raised itself, has not published or handed on anything.
        if isinstance(run.state, Claimed):
            run.end(_end_by_error(run, signal))
        if not isinstance(signal, Reject):
            run.stop_if_lost()
        raise
    except NotCommittedError:
        raise
    except Exception as error:
        if _ran_on(run):
            raise
        _stop_if_handed_on(run)
        if run.unit is not None:
            run.unit.watch.on_error(error)  # of a framework's own connection
            if run.unit.watch.gave_way is not None:  # whatever the body made of it
                raise NotCommittedError(error, again=True) from error
            # A signal may have interrupted the driver in the middle of an answer.
            run.unit.roll_back(broken=isinstance(error, SoftTimeLimitExceeded))
        run.end(_end_by_error(run, error))
        raise
    if _ran_on(run):
        return value
    _stop_if_handed_on(run)
    end = end_by_value(value, eager=run.request.is_eager)
    run.end(end)
    if isinstance(end, Retried):  # `apply` continues with the next attempt, which sends the callbacks
        run.request.callbacks = run.request.chain = None
    return value


def _end_by_error(run: Run, error: BaseException) -> BodyEnd:
    return end_by_error(error, replacing=run.replacing, rejections=run.header.rejected)


def _reassert_claim(run: Run) -> None:
    """Renew the claim if the process was suspended before the body for longer than the lease: another worker may have taken over."""
    try:
        lost = run.queue_log.store.renew([run.held_claim], lease=run.task.idempotency.lease)
    except StoreError as error:
        logger.warning("%s runs although its claim may be lost, since the store gives no answer: %s", run, error)
        return
    if lost:
        run.lose()


def _ran_on(run: Run) -> bool:
    """Return whether the body replaced itself by the same task eagerly: that run has already written the outcome of both."""
    return isinstance(run.state, HandedOn) and bool(run.request.is_eager)


def _stop_if_handed_on(run: Run) -> None:
    """Stop a body that continued after ``retry(throw=False)``: the retry decides the outcome."""
    if isinstance(run.state, HandedOn):
        raise Ignore(f"{run} was handed on to its next attempt")
    run.stop_if_lost()
