"""One guarded run: from the claim to the outcome.

A run lives on Celery's request for as long as the request is traced. Its writes are fenced by the claim's token; a write that
finds the claim gone ends the run without a result, a callback or an acknowledged outcome of its own.
"""

# Longer than most: the ways in which one run ends share its claim, its transaction and its state.

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, assert_never, cast

from celery import Task, states
from celery.backends.base import DisabledBackend
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from kombu.exceptions import EncodeError

from celery_idempotent.core import records
from celery_idempotent.core.records import (
    Claim,
    MessageKey,
    NewMessage,
    NoResultReason,
    NotClaimed,
    ProcessedStatus,
    Row,
    Status,
)
from celery_idempotent.core.store_retry import ask_until_answered
from celery_idempotent.errors import (
    AlreadyFailedError,
    ConfigurationError,
    LeaseLostError,
    SchemaError,
    StoreError,
    StoreUnavailableError,
)
from celery_idempotent.hooks import OutcomeKind, reason_of
from celery_idempotent.message.canvas_ids import Calls, derived
from celery_idempotent.message.header import Header
from celery_idempotent.message.serialization import decode_result, encode_message, encode_result
from celery_idempotent.producer.box import within
from celery_idempotent.producer.guarded import RUN, Guarded, current_run
from celery_idempotent.worker.body_end import (
    BodyEnd,
    Completed,
    Failed,
    Ignored,
    Released,
    Retried,
    end_as_seen,
    end_by_error,
    end_by_value,
)
from celery_idempotent.worker.celery_versions import ignores_result
from celery_idempotent.worker.delivery import describe, waited_on, worker_label
from celery_idempotent.worker.lease_renewal import LeaseRenewer
from celery_idempotent.worker.run_state import (
    Checkpointed,
    Claimed,
    Finished,
    HandedOn,
    Lost,
    Replayed,
    RunState,
    Unguarded,
    check_transition,
)
from celery_idempotent.worker.time_limits import TimeLimits
from celery_idempotent.worker.unit_of_work import RUNS, NotCommittedError, Setback, UnitOfWork, given_up_error
from celery_idempotent.worker.unstorable import Keeping

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context

    from celery_idempotent.core.store import Store

__all__ = ["Passage", "Run"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")


#: Seconds that an attempt which has ended its row is given to store its result, and between two looks for that.
_OWN_RESULT_WITHIN = 2.0
_ASK_EVERY = 0.05

#: While a store is so, the end of a body waits for it. A table that is gone may be back after a restore, or after an ``init``.
_AWAY = (StoreUnavailableError, SchemaError)

#: Seconds of the pause before an atomic body is run again, at most; twice as long each time.
_FIRST_PAUSE = 0.1


class Passage(StrEnum):
    """How far the calls of a run have come: through the guard, then through each ``__call__`` of its task's classes."""

    OUTSIDE = "outside"  # no ``__call__`` yet
    CALLED = "called"  # the guard runs the first of them
    IN_BODY = "in_body"  # Celery's own, the last of them, runs the body


class Run:
    """A delivery's way through the guard."""

    def __init__(self, task: Guarded, request: Context, message: NewMessage, header: Header) -> None:
        self.task = task
        self.queue_log = task.queue_log
        self.request = request
        self.message = message
        self._state: RunState = Unguarded()
        #: What the message's header says, and what its row has told of it since.
        self.header = header
        #: Whether the body is about to replace itself by another task under the same task id.
        self.replacing = False
        self.passage = Passage.OUTSIDE
        #: The transaction of an atomic body, while that runs.
        self.unit: UnitOfWork | None = None
        #: What the store takes of the result, and of the next attempt's message.
        self.keeping = Keeping()
        #: Seconds that the body took, once it has ended.
        self.ran: float | None = None
        self.limits = TimeLimits(task, request)
        #: Make the full record of the message, should the store have forgotten it while its body ran.
        self.adopt: Callable[[], NewMessage] | None = None
        #: When the claim was asked for, by the monotonic clock: its lease does not run out before that much later.
        self.asked = time.monotonic()

    @classmethod
    def of(cls, request: Context | None) -> Run | None:
        """Return the run of a request, if it was admitted."""
        return cast("Run | None", getattr(request, RUN, None))

    @classmethod
    def current(cls, app: Celery) -> Run | None:
        """Return the run of the task that this worker executes here and now."""
        return cast("Run | None", current_run(app))

    def later_call(self, task_id: str) -> str | None:
        """Return the name of a call that Celery sends behind this run, under a Celery id that was sent before.

        Returns:
            The same each time; ``None`` if an earlier run of this very message may be who sent it.
        """
        if self.header.call is None and self.ran is None:
            return None
        return f"again:{derived(self.header.call or self.request.id, task_id)}"

    def attach(self) -> None:
        """Let the request carry this run, and keep its claim alive."""
        setattr(self.request, RUN, self)
        if self.claim is not None:
            LeaseRenewer.of(self.queue_log).hold(self.claim, self.task.idempotency.lease, asked=self.asked)

    def detach(self) -> None:
        """Let the claim go, since the run is over: nothing keeps it alive any more."""
        self.adopt = None
        if self.claim is not None:
            LeaseRenewer.of(self.queue_log).let_go(self.claim)

    @property
    def state(self) -> RunState:
        """How far the run has come."""
        return self._state

    def move_to(self, state: RunState) -> None:
        """Take the next state. Nothing else sets one.

        Raises:
            AssertionError: No run goes there, and these are our tests; elsewhere it is logged.
        """
        check_transition(self._state, state, whose=self)
        self._state = state

    @property
    def claim(self) -> Claim | None:
        """The claim that the run has, or had when it ended."""
        return self._state.claim

    @property
    def key(self) -> MessageKey:
        """The message's key."""
        return self.message.key

    @cached_property
    def calls(self) -> Calls:
        """The calls that the body makes."""
        return Calls(self.key, self.header.original_id, self.message.attempt - self.header.worker_lost_retries)

    @property
    def is_unguarded(self) -> bool:
        """Whether it has no row to speak of."""
        return isinstance(self.state, Unguarded)

    @property
    def in_body(self) -> bool:
        """Whether the body has not ended yet."""
        return isinstance(self.state, (Unguarded, Claimed, HandedOn))

    @property
    def waited_on(self) -> bool:
        """Whether callbacks, a chain or a chord are sent once the body has returned, or the task's own ``on_success`` is called."""
        return waited_on(self.request) or type(self.task).on_success is not Task.on_success

    @property
    def on_store_error(self) -> Literal["retry", "run", "raise"]:
        """What the app says; but an atomic body cannot run without the store, and waits for it."""
        policy = self.queue_log.settings.on_store_error
        return "retry" if policy == "run" and self.task.idempotency.atomic else policy

    @property
    def _store(self) -> Store:
        return self.queue_log.store

    def emit(
        self,
        kind: OutcomeKind,
        row: Row | None = None,
        *,
        reason: str | None = None,
        attempt: int | None = None,
        store: float | None = None,
        delay: float | None = None,
    ) -> None:
        """Tell the app's hooks, if it has any, what became of the delivery."""
        self.queue_log.outcomes.emit(
            kind,
            self.key,
            row=row,
            task_id=self.request.id,
            queue=self.message.queue,
            attempt=self.message.attempt if attempt is None else attempt,
            token=None if self.claim is None else self.claim.token,
            worker=worker_label(self.request.hostname),
            reason=reason,
            store=store,
            ran=self.ran,
            delay=delay,
        )

    # -- the body ------------------------------------------------------------------------------------------------------

    def perform(self, body: Callable[[], T]) -> T:
        """Run the body, or return the stored result, and record how it ended.

        Raises:
            Ignore: The claim was lost, or the message goes on elsewhere: this run has no outcome.
        """
        return self.limits.without(lambda: self._perform_or_replay(partial(self.limits.within, body)))

    def _perform_or_replay(self, body: Callable[[], T]) -> T:
        self.passage = Passage.CALLED
        if isinstance(self.state, (Replayed, Checkpointed)):
            return cast("T", self.state.value)
        if isinstance(self.state, Unguarded):
            return self._perform_unrecorded(body) if self.task.idempotency.atomic else body()
        if self.claim is not None and time.monotonic() - self.asked > self.task.idempotency.lease:
            self._reassert_claim()
        if self.task.idempotency.atomic:
            return self._perform_atomically(body)
        with within(None):  # an eager run inside of an outbox, or of an atomic body, stands for itself
            return self._perform(body)

    def _perform_unrecorded(self, body: Callable[[], T]) -> T:
        """Run the body of an atomic task that is turned off: in a transaction, without a row that would end with it."""
        unit = UnitOfWork(self.queue_log)
        try:
            with unit as self.unit, within(unit.outbox):
                value = body()
                if unit.opened:
                    unit.commit(lambda _: True)
                    self._publish(unit)
        finally:
            self.unit = None
        return value

    def _perform_atomically(self, body: Callable[[], T]) -> T:
        """Run the body in a transaction, and again in a new one if that gave way to others."""

        def flushed() -> T:
            if self.unit is not None and setback is Setback.NOT_CONNECTED and self._waits:
                # Not by running the body over and over: what it does elsewhere before it writes, it would do each time.
                ask_until_answered(self.unit.open, "begin the transaction of", self)
            value = body()
            if self.unit is not None and isinstance(self.state, Claimed):
                self.unit.flush()
            return value

        longest, collided = 0.0, False
        setback: Setback | None = None
        for number in range(1, RUNS + 1):
            began = time.monotonic()
            try:
                unit = UnitOfWork(self.queue_log, contended=collided)
            except ConfigurationError as wrong:
                self.end(Failed(describe(wrong)))
                raise
            try:
                with unit as self.unit, within(unit.outbox):
                    return self._perform(flushed)
            except NotCommittedError as stopped:
                error, again = stopped.error, stopped.again and number < RUNS
                setback = unit.setback
                collided = collided or setback is Setback.COLLIDED
            finally:
                self.unit = None
            if not again:
                break
            logger.warning(
                "%s is run again, as its transaction was not committed (run %d of %d): %s", self, number, RUNS, error
            )
            longest = max(longest, time.monotonic() - began)
            time.sleep(random.uniform(0, _FIRST_PAUSE * 2 ** (number - 1)))  # noqa: S311 - spreads contenders
            self._before_another_run(longest if collided else 0.0)
        self.end(Failed(describe(error)))
        raise error

    def _before_another_run(self, unrenewed: float) -> None:
        """Make sure of the claim, for long enough that no renewal falls into a run that takes so many seconds.

        A renewal writes the row. Where a transaction's snapshot is fixed (``REPEATABLE READ`` and above on PostgreSQL) it could
        not complete a row that was written since, and a body longer than a third of its lease never would. What only lost its
        connection has the lease that it had: whoever takes over from a process that dies soon after waits for the end of that.
        """
        lease = self.task.idempotency.lease + 2 * unrenewed
        lost = self._write("keep a claim", lambda: self._store.renew([self._claim], lease=lease))
        if lost:
            self._lose()
        self.passage, self.replacing = Passage.CALLED, False
        self.__dict__.pop("calls", None)  # it makes the same calls in the same places

    def _perform(self, body: Callable[[], T]) -> T:
        began = time.monotonic()
        try:
            try:
                value = body()
            finally:
                self.ran = time.monotonic() - began
        except (Retry, Ignore, Reject) as way:
            # An eager retry, or one that is raised by hand, has published nothing and handed nothing on.
            if isinstance(self.state, Claimed):
                self.end(self._end_by_error(way))
            if not isinstance(way, Reject):
                self._stop_if_lost()
            raise
        except NotCommittedError:
            raise
        except Exception as error:
            if self._ran_on:
                raise
            self._stop_if_sent_on()
            if self.unit is not None:
                if self.unit.gave_way is not None:  # whatever the body made of it
                    raise NotCommittedError(error, again=True) from error
                # A signal may have struck in the middle of an answer.
                self.unit.roll_back(broken=isinstance(error, SoftTimeLimitExceeded))
            self.end(self._end_by_error(error))
            raise
        if self._ran_on:
            return value
        self._stop_if_sent_on()
        end = end_by_value(value, eager=self.request.is_eager)
        self.end(end)
        if isinstance(end, Retried):  # `apply` goes on with the next attempt, after which the callbacks are sent
            self.request.callbacks = self.request.chain = None
        return value

    def _end_by_error(self, error: BaseException) -> BodyEnd:
        return end_by_error(error, replacing=self.replacing, rejections=self.header.rejected)

    def _reassert_claim(self) -> None:
        """Renew the claim after the process slept for longer than the lease before the body: somebody else may have run it since."""
        try:
            lost = self._store.renew([self._claim], lease=self.task.idempotency.lease)
        except StoreError as error:
            logger.warning("%s runs although its claim may be lost, the store gives no answer: %s", self, error)
            return
        if lost:
            self._lose()

    def end(self, end: BodyEnd) -> None:
        """Write how the body ended, and take the state that follows from it.

        Raises:
            EncodeError: The result backend cannot take the value, so the message has failed.
            Ignore: The claim was lost. (After :class:`Retried` the state says so.)
            NotCommittedError: The transaction of an atomic body was not committed.
        """
        match end:
            case Completed():
                self._complete(end)
            case Failed(error):
                self._finish(self._failed(error))
            case Retried(retry):
                self.hand_on(self._retried(retry))
            case Released():
                self._release()
            case Ignored(note):
                self._finish(self._completed(None, note=note))
            case _:  # pragma: no cover - the type checker proves it away
                assert_never(end)

    def _complete(self, end: Completed) -> None:
        waited_on = self.waited_on and not end.dispatched
        wanted = self.task.idempotency.keep_result or waited_on
        result = encode_result(self.task.app, end.value, trace=self.header.trace) if wanted else None
        refusal = None if result is not None or end.dispatched else self._refused_by_backend(end.value)
        if refusal is not None:
            self._finish(self._failed(describe(refusal)))
            raise refusal
        if not waited_on:
            self._finish(self._completed(result))
            return
        # What waits on this result is sent after we return: until it is known to be, the row says so.
        # On SQLite a transaction that writes keeps all others from writing, renewals too: the lease may have run out.
        lease = None if self.unit is None else self.task.idempotency.lease
        held = self._commit(
            "note a recovery point",
            result,
            lambda store, kept: store.checkpoint(self._claim, result=kept, lease=lease),
            self._has_succeeded,
        )
        if not held:
            self._lose()
        self.move_to(Checkpointed(self._claim, end.value))

    def _release(self) -> None:
        held = self._held("release a message", lambda: self._store.release(self._claim))
        held = held or self._is_pending(self.message.attempt)
        if held:
            self.emit(OutcomeKind.RETRIED, reason="rejected")
        self._finish(held)

    def _refused_by_backend(self, value: Any) -> EncodeError | None:
        """Return what Celery will tell the caller instead of the value: that its result backend cannot take it."""
        request, backend = self.request, self.task.backend
        stored = not request.is_eager or self.task.store_eager_result
        if not stored or ignores_result(self.task, request) or isinstance(backend, DisabledBackend):
            return None
        try:
            backend.encode(backend.prepare_value(value))
        except EncodeError as error:
            return error
        return None

    # -- what follows the body -----------------------------------------------------------------------------------------

    def end_as_seen(self, state: str | None, outcome: Any) -> None:
        """End a claim that the guard has not ended, by what Celery saw.

        Args:
            state: Celery's, of the run. ``None`` if the process is about to exit: the worker's request learns of that.
            outcome: The return value, or the exception.
        """
        if not isinstance(self.state, Claimed) or state is None:
            return
        logger.error(
            "%s was still claimed when Celery had finished with it, and ends as Celery saw it, %s: either its before_start raised, "
            "or something calls its body past the guard",
            self,
            state,
        )
        try:
            self.end(end_as_seen(state, outcome, replacing=self.replacing, rejections=self.header.rejected))
        except Ignore:  # the claim was lost, which is logged
            return
        except StoreError as error:
            logger.error("%s stays claimed until its lease runs out: %s", self, error)

    def dispatched(self) -> None:
        """Callbacks and result of a checkpointed run were sent."""
        if isinstance(self.state, Checkpointed):
            self._end(self._completed(None))

    def not_dispatched(self, error: BaseException | None) -> None:
        """Note at the end of the run that callbacks and result which were still to be sent could not be.

        Args:
            error: Why, if that is known.
        """
        if not isinstance(self.state, Checkpointed):
            return
        if isinstance(error, EncodeError):  # no later attempt can succeed
            self._end(self._failed(describe(error)))
        else:
            logger.error("%s ran, but what follows it was not sent; a later delivery sends it: %r", self, error)

    def _end(self, held: bool) -> None:
        self.move_to(Finished(self._claim) if held else Lost(self._claim))
        if not held:
            self.emit(OutcomeKind.LEASE_LOST)

    # -- handing on ----------------------------------------------------------------------------------------------------

    def hand_on(self, message: NewMessage) -> bool:
        """Move the row on to this message's next attempt, just before that is published.

        Returns:
            Whether the claim still held; if not, nothing may be published.
        """
        if isinstance(self.state, Unguarded):
            return True
        if not isinstance(self.state, Claimed):
            return False

        def hand_on(store: Store) -> bool:
            return store.retry(self._claim, replace(message, message=self.keeping.of(message.message)))

        def handed_on() -> bool:
            return self._is_pending(message.attempt)

        if self.replacing:  # by itself: what the body did until here stands
            held = (
                self._commit("hand a message on", message.message, lambda store, _: hand_on(store), handed_on)
                or handed_on()
            )
        else:
            wrote = partial(self.keeping.write, message.message, lambda _: hand_on(self._store))
            held = self._held("hand a message on", wrote) or handed_on()
        self.move_to(HandedOn(self._claim) if held else Lost(self._claim))
        if held:
            self.emit(OutcomeKind.RETRIED, attempt=message.attempt, reason="replaced" if self.replacing else None)
        self.detach()
        return held

    def leave_to_recovery(self, error: BaseException) -> bool:
        """Note that the next attempt's row is still to be published: the broker did not take it, or may not have.

        Returns:
            Whether there is such a row.
        """
        if not isinstance(self.state, HandedOn):
            return False
        logger.error("%s goes on when recovery can publish it: %r", self, error)
        try:
            self._store.not_published(self.key, token=self._claim.token)
        except StoreError as unknown:
            logger.error("%s has to be overtaken first, the store gives no answer: %s", self, unknown)
        return True

    def not_handed_on(self, message: NewMessage, error: BaseException) -> None:
        """End the message whose next attempt could not be published, unless a copy of it runs already."""
        if not isinstance(self.state, HandedOn):
            return

        def end() -> bool:
            again = self._store.claim(message, worker=worker_label(self.request.hostname), lease=1.0, grace=0.0)
            if not isinstance(again, records.Claimed):
                return False
            return self._store.fail(again.claim, error=describe(error), unique_for=self.task.idempotency.unique_for)

        if self._write("end a message whose retry was not published", end):
            self.emit(OutcomeKind.FAILED, reason=reason_of(describe(error)))

    def retry_stored(self) -> None:
        """Store the next attempt's end once more if RETRY, which the result backend was told just now, has hidden it.

        Celery publishes a retry before it stores that state: with ``countdown=0`` another process may be through by then, and
        its AsyncResult would be RETRY for ever. What it ended with is stored once more, from its row.
        """
        backend, task_id = self.task.backend, self.request.id
        if not isinstance(self.state, HandedOn) or self.request.is_eager or isinstance(backend, DisabledBackend):
            return
        if ignores_result(self.task, self.request) or not backend.persistent:
            return
        row = self._store.find(self.key)
        if row is None or row.ran_task_id != task_id or row.processed_status is None:
            return
        # The row is written before the result: the attempt that ended may be about to store it, with the error itself.
        deadline = time.monotonic() + _OWN_RESULT_WITHIN
        while backend.get_state(task_id) not in states.READY_STATES:
            if time.monotonic() >= deadline:
                break
            time.sleep(_ASK_EVERY)
        else:
            return
        if row.processed_status is ProcessedStatus.SUCCESS:
            value = None if row.result is None else decode_result(self.task.app, row.result)
            backend.store_result(task_id, value, states.SUCCESS, request=self.request)
        else:
            error = AlreadyFailedError(self.key.message_id, row.error)
            backend.store_result(task_id, error, states.FAILURE, request=self.request)

    def _is_pending(self, attempt: int) -> bool:
        """Return whether the row is where a write of ours put it whose answer was lost: pending, under our token."""
        row = self._write("read a message", lambda: self._store.find(self.key))
        return row is not None and (row.status, row.token, row.attempt) == (Status.PENDING, self._claim.token, attempt)

    def _retried(self, retry: Retry) -> NewMessage:
        request, signature = self.request, retry.sig
        args = request.args if signature is None else signature.args
        kwargs = request.kwargs if signature is None else signature.kwargs
        options = {} if signature is None else dict(signature.options)
        return NewMessage(
            key=self.key,
            task_id=self.message.task_id,
            fingerprint=self.message.fingerprint,
            attempt=request.retries + 1,
            delay=0.0,
            # The arguments of an eager run may be anything.
            message=None
            if request.is_eager
            else encode_message(args, kwargs, options, serializer=self.task.serializer),
        )

    # -- writes --------------------------------------------------------------------------------------------------------

    @property
    def _claim(self) -> Claim:
        assert self.claim is not None, "only a claimed run writes"
        return self.claim

    def _completed(self, result: bytes | None, note: NoResultReason | None = None) -> bool:
        unique_for, began = self.task.idempotency.unique_for, time.monotonic()
        held = self._commit(
            "record a success",
            result,
            lambda store, kept: store.complete(
                self._claim,
                result=kept,
                note=note or (NoResultReason.UNKEPT if self.keeping.refused else None),
                unique_for=unique_for,
            ),
            self._has_succeeded,
        )
        if held:
            self.emit(OutcomeKind.COMPLETED, reason=note, store=time.monotonic() - began)
        return held

    def _failed(self, error: str) -> bool:
        unique_for, began = self.task.idempotency.unique_for, time.monotonic()
        held = self._held("record a failure", lambda: self._store.fail(self._claim, error=error, unique_for=unique_for))
        if held:
            self.emit(OutcomeKind.FAILED, reason=reason_of(error), store=time.monotonic() - began)
        return held

    def _has_succeeded(self) -> bool:
        """Return whether the row says that our body has succeeded: nobody else can have written so under its token."""
        row = self._write("read a message", lambda: self._store.find(self.key))
        return row is not None and (row.token, row.processed_status) == (self._claim.token, ProcessedStatus.SUCCESS)

    def _commit(
        self,
        what: str,
        value: bytes | None,
        write: Callable[[Store, bytes | None], bool],
        written: Callable[[], bool],
    ) -> bool:
        """Write how a body ended well, together with what it wrote itself if it is an atomic one.

        Args:
            what: For the log.
            value: What the row is to keep, if the store takes it.
            write: The verb.
            written: Reads whether it was done.

        Returns:
            Whether the claim still held.

        Raises:
            NotCommittedError: The transaction was not committed.
        """
        unit = self.unit
        if unit is None or not unit.opened:
            return self._held(what, lambda: self.keeping.write(value, lambda kept: write(self._store, kept)))
        kept, refused = self.keeping.of(value), list[Exception]()

        def write_in_transaction(store: Store) -> bool:
            try:
                return write(store, kept)
            except Exception as error:
                refused.append(error)
                raise

        try:
            held = unit.commit(write_in_transaction)
        except Exception as error:
            unit.roll_back(broken=True)
            if not (unit.in_doubt and self._commit_succeeded(written)):
                again = unit.gave_way is not None
                if error in refused and unit.setback is not Setback.COLLIDED:
                    again = self.keeping.learn(error, kept, silent=again) or again
                raise NotCommittedError(error, again=again) from error
            logger.warning("%s was committed, although the answer was lost: %r", self, error)
            held = True
        else:
            if unit.in_doubt and not written():
                raise NotCommittedError(given_up_error(), again=unit.gave_way is not None)
        if held:
            self._publish(unit)
        return held

    def _publish(self, unit: UnitOfWork) -> None:
        """Publish what the body has sent."""
        try:
            unit.outbox.publish()
        except SoftTimeLimitExceeded:
            # The signal struck between; the relay publishes what was not.
            logger.warning("%s ran into its time limit behind its commit", self)

    def _commit_succeeded(self, written: Callable[[], bool]) -> bool:
        """Return whether a commit whose answer is lost did."""
        # A server that has yet to notice may still commit: it has the row until then, and a write of ours waits for it. The lease is
        # longer than any before (see `_before_another_run`), so that it is a write.
        lease = self.task.idempotency.lease + 2 * (time.monotonic() - self.asked)
        self._write("learn how a commit went", lambda: self._store.renew([self._claim], lease=lease))
        return written()

    def _held(self, what: str, ask: Callable[[], bool]) -> bool:
        """Write an outcome; whether the claim still held, or could be had again."""
        return self._write(what, ask) or (self._claim_again() and self._write(what, ask))

    def _claim_again(self) -> bool:
        """Claim a message anew that the store has forgotten: what has no row was not taken over either.

        A Redis that keeps nothing was restarted, or a database was restored, and the outcome of the body that ran must not be lost with it.
        """
        adopt = self.adopt
        if adopt is None or self._write("read a message", lambda: self._store.find(self.key)) is not None:
            return False

        def claim() -> records.Claimed | NotClaimed:
            return self._store.claim(
                self.message,
                worker=worker_label(self.request.hostname),
                lease=self.task.idempotency.lease,
                grace=0.0,
                adopt=adopt,
            )

        answer = self._write("claim a forgotten message", claim)
        if not isinstance(answer, records.Claimed):
            return False
        logger.error("%s was forgotten by the store while its body ran, and is recorded again", self)
        self.detach()
        assert isinstance(self.state, (Claimed, Checkpointed)), "only these have an outcome to write"
        self.move_to(replace(self.state, claim=answer.claim))
        self.adopt, self.asked = adopt, time.monotonic()
        self.attach()
        return True

    def _write(self, what: str, ask: Callable[[], T]) -> T:
        """Ask the store to write an outcome, however long it takes: see ``idempotent_on_store_error``."""
        if self.unit is not None:
            # What is written beside an atomic body's transaction is written after it, and could not be on SQLite before.
            self.unit.roll_back()

        def write() -> T:
            return ask_until_answered(ask, f"{what} for", self, silences=_AWAY) if self._waits else ask()

        try:
            return write()
        except SoftTimeLimitExceeded:
            # The signal struck while the outcome of a finished body was being written; the write may be repeated.
            return write()
        except _AWAY as error:
            if self.on_store_error == "run":
                logger.error("could not %s for %s, so a copy of it may run again: %s", what, self, error)
                return cast("T", True)
            raise

    @property
    def _waits(self) -> bool:
        """Whether the store is waited for as long as it gives no answer."""
        return not self.request.is_eager and self.on_store_error == "retry"

    def _finish(self, held: bool) -> None:
        if not held:
            self._lose()
        self.move_to(Finished(self._claim))

    def _lose(self) -> NoReturn:
        self.move_to(Lost(self._claim))
        self._stop()

    @property
    def _ran_on(self) -> bool:
        """Whether the body replaced itself by itself eagerly: that run is over and has written the outcome of both."""
        return isinstance(self.state, HandedOn) and bool(self.request.is_eager)

    def _stop_if_sent_on(self) -> None:
        """``retry(throw=False)``: the body went on after it, but the retry is what decides."""
        if isinstance(self.state, HandedOn):
            raise Ignore(f"{self} was handed on to its next attempt")
        self._stop_if_lost()

    def _stop_if_lost(self) -> None:
        if isinstance(self.state, Lost):
            self._stop()

    def _stop(self) -> NoReturn:
        # Raised as LeaseLostError, it would be stored as this task's FAILURE over its new owner's result.
        error = LeaseLostError(self.key.message_id, self._claim.token)
        undone = "; what its body wrote in its transaction was rolled back" if self.task.idempotency.atomic else ""
        logger.error("%s: %s%s", self, error, undone)
        self.emit(OutcomeKind.LEASE_LOST)
        raise Ignore(str(error)) from error

    def __str__(self) -> str:
        return str(self.key)
