"""The consumer's side: claim a delivered message, or do what its row calls for."""

# Longer than most: each branch of one decision about one delivery, on the same state.

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, assert_never

from celery import states
from celery.backends.base import DisabledBackend
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from kombu.exceptions import ContentDisallowed, DecodeError

from celery_idempotent.core import store_retry
from celery_idempotent.core.decision import Delivery, DeliveryAction, DeliveryDecision, decide_delivery
from celery_idempotent.core.records import (
    ABANDONED,
    FORGOTTEN,
    Claim,
    Claimed,
    MessageKey,
    NewMessage,
    NoResultReason,
    NotClaimed,
    ProcessedStatus,
    Row,
    Status,
)
from celery_idempotent.errors import (
    AlreadyFailedError,
    AlreadyProcessingError,
    ConfigurationError,
    IdempotentError,
    MessageMismatchError,
    StoreError,
    StoreUnavailableError,
)
from celery_idempotent.hooks import OutcomeKind, reason_of
from celery_idempotent.message.canvas_ids import fix_callbacks, unsent_errbacks
from celery_idempotent.message.header import HEADER, Header, rejections
from celery_idempotent.message.identity import FANOUT, Identity, identity_of
from celery_idempotent.message.serialization import (
    UndecodableError,
    content_of,
    decode_message,
    decode_result,
    encode_message,
    serializer_of,
    trace_of,
)
from celery_idempotent.producer.identify import identify
from celery_idempotent.worker import run_state
from celery_idempotent.worker.celery_versions import ignores_result
from celery_idempotent.worker.chords import claimed_for
from celery_idempotent.worker.claim_request import ClaimAnswer, ClaimRequest
from celery_idempotent.worker.delivery import answered, describe, waited_on, worker_label
from celery_idempotent.worker.events import DuplicateIgnored
from celery_idempotent.worker.hold import hold_countdown, hold_delay, publish_copy
from celery_idempotent.worker.late_retry import OWN_RESULT_WITHIN
from celery_idempotent.worker.run import Run

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_idempotent.core.store import Store
    from celery_idempotent.producer.guarded import Guarded

__all__ = ["admit", "come_again"]

logger = logging.getLogger("celery_idempotent")

#: How often a row may change during one decision before the message is held instead.
_ATTEMPTS = 10

#: Seconds to hold a message whose row kept changing.
_SETTLE = 1.0

#: How long after its row says failure a failed attempt may take to store its error.
_OWN_RESULT_WITHIN = timedelta(seconds=OWN_RESULT_WITHIN)

#: Seconds of grace for an older copy in the claim itself: the decision on the row says whether it runs in a retry's place, and as which attempt.
_NEVER = 1e9


def admit(task: Guarded, request: Context) -> Run:
    """Decide what to do with a delivery, and do what comes before the body.

    Args:
        task: The delivery's task.
        request: Celery's traced request.

    Returns:
        A run that holds the message, replays its result, or is unguarded.

    Raises:
        Ignore: There is nothing to do here: it was done, or a copy was published to come again later.
        AlreadyFailedError: The first run failed; this copy's caller gets the error.
        AlreadyProcessingError: Another delivery runs, and the task has ``on_processing="raise"``.
        ConfigurationError: No store can keep its ids, headers or numbers.
        MessageMismatchError: The id is known with other arguments.
        StoreUnavailableError: The store gave no answer, and the app has ``on_store_error="raise"``.
    """
    try:
        identity = identity_of(task, request)
        delivered = _delivered(identity, request)
    except ConfigurationError:
        decision = decide_delivery(None, Delivery(request.id, storable=False), task.idempotency.delivery)
        assert decision.action is DeliveryAction.REFUSE, "it is decided before all"
        raise
    admission = _Admission(task, request, identity, delivered)
    return admission.run.limits.without(admission.decide)


def come_again(run: Run) -> Exception | None:
    """Hold the message of a run that lost its claim, if a delivery under another Celery id has taken its place.

    That delivery answers only its own caller. Recovery would answer this run's caller, and what waits on it, only once the row that keeps
    this message is overtaken: on a quiet queue, never. A message that the store has forgotten comes again too, because no other delivery
    has it and what an atomic body wrote was rolled back.

    Returns:
        What to end the run with; ``None`` if this delivery need not come again, or the store gives no answer.
    """
    task, request = run.task, run.request
    if request.is_eager:
        return None
    identity = identity_of(task, request)
    if identity.node is not None:
        return None
    try:
        row = run.queue_log.store.find(run.key)
        if row is not None and (
            row.task_id != run.header.original_id or row.error == FORGOTTEN or not _is_kept(run, row)
        ):
            return None
        admission = _Admission(task, request, identity, _delivered(identity, request))
        return admission.hold_behind(row)
    except StoreError as error:
        logger.warning("%s is left to recovery, which answers its caller: %s", run, error)
        return None


def _is_kept(run: Run, row: Row) -> bool:
    """Return whether a run that lost its claim still has to be answered: it has its own row, or another Celery id ran in its row."""
    own = run.header.row_of_its_own
    if own != run.key:
        return run.queue_log.store.find(own) is not None
    return row.ran_task_id not in (None, run.request.id)


def _delivered(identity: Identity, request: Context) -> NewMessage:
    """Return a delivery as the message to claim.

    Raises:
        ConfigurationError: No store can keep it.
    """
    return NewMessage(
        key=identity.key,
        task_id=request.id,
        queue=(request.delivery_info or {}).get("routing_key"),
        attempt=0 if request.retries is None else request.retries,
    )


class _Admission:
    """The decision about one delivery."""

    def __init__(self, task: Guarded, request: Context, identity: Identity, delivered: NewMessage) -> None:
        self.task = task
        self.request = request
        self.identity = identity
        key = MessageKey(identity.message_id, task.name)
        header = Header.delivered(key, request.id, request.headers)
        #: Whether the message says which Celery id was first sent under its message id.
        self.knows_first = header is not None
        if header is None:
            # From a producer without this library. Its id stands; the task's options say whether its arguments are compared.
            named = key.message_id if key.message_id != request.id and identity.older is None else None
            _, fingerprint = identify(
                task.idempotency,
                request.args,
                request.kwargs,
                message_id=named,
                task_id=request.id,
                task_name=task.name,
            )
            header = Header.new(key, request.id, fingerprint)
        if header.trace is None:
            header = replace(header, trace=task.queue_log.outcomes.trace_among(request.headers))
        header = replace(header, rejected=header.rejected + rejections(request.headers))
        fix_callbacks(request)
        self.message = replace(delivered, fingerprint=header.fingerprint, original_task_id=header.original_task_id)
        self.run = Run(task, request, self.message, header)
        self._mark()
        self.claim_request = ClaimRequest(request.hostname)

    @property
    def _store(self) -> Store:
        return self.run.queue_log.store

    @contextmanager
    def _asking_the_backend(self) -> Iterator[None]:
        """Hold the message while the result backend gives no answer, as for the store.

        An error here would fail the message outside of its body. Each backend's client has its own error classes, so catch any.
        """
        try:
            yield
        except (Ignore, IdempotentError, DecodeError, ContentDisallowed, SoftTimeLimitExceeded):
            raise
        except Exception as error:
            if self.request.is_eager:
                raise
            logger.error(
                "%s is delivered again in %.0f s, the result backend gives no answer: %r",
                self.run,
                store_retry.REDELIVER_AFTER,
                error,
            )
            raise self._hold(store_retry.REDELIVER_AFTER) from error

    def decide(self) -> Run:
        policy = self.run.on_store_error
        try:
            if policy == "retry" and not self.request.is_eager:
                return self._in_time(store_retry.ask_until_deadline(self._admit, "claim", self.run, self._patience))
            return self._in_time(self._admit())
        except StoreError as error:  # also when the table was dropped: its messages wait until it is back
            if policy == "run":
                logger.error("%s runs unguarded, the store gives no answer: %s", self.run, error)
                self.run.emit(OutcomeKind.UNGUARDED)
                self.run.attach()
                return self.run
            if policy == "raise" or self.request.is_eager:
                raise
            logger.error(
                "%s is delivered again in %.0f s, the store gives no answer: %s",
                self.run,
                store_retry.REDELIVER_AFTER,
                error,
            )
            raise self._hold(store_retry.REDELIVER_AFTER) from error

    def _patience(self) -> float:
        """Seconds to wait for the store in place: a time limit is for the body, and must not strike before it began."""
        return min(store_retry.WAIT_IN_PLACE, self.run.limits.patience)

    def _in_time(self, run: Run) -> Run:
        """Release a claim that came so late that the body would run into its time limit."""
        if self.request.is_eager or not isinstance(run.state, run_state.Claimed) or not run.limits.spent:
            return run
        logger.warning("%s is given back: it waited for its claim through much of its time limit", run)
        claim = run.state.claim
        run.detach()
        store_retry.ask_until_answered(lambda: self._store.release(claim), "release", run)
        run.move_to(run_state.Finished(claim))
        raise self._hold(_SETTLE)

    def _admit(self) -> Run:
        with self.claim_request.noting_silence():
            return self._claim_or_decide()

    def _is_unrecorded(self) -> bool:
        """Return whether the task is turned off and its message was never recorded: Celery then runs it without the guard."""
        if self.task.idempotency.idempotent or self.knows_first:
            return False
        row = self._store.find(self.message.key)
        return row is None or row.expired

    def _claim_or_decide(self) -> Run:
        if self.identity.older is not None:
            self._prefer(self.identity.older)
        if self._is_unrecorded():
            # Without the header, so that its retry does not look like a recorded message's.
            self.request.headers = {name: value for name, value in self.request.headers.items() if name != HEADER}
            self.run.attach()
            return self.run
        for _ in range(_ATTEMPTS):
            asked = self.claim_request.ask(self._ask)
            self.run.asked = asked.at
            run = self._follow(asked)
            if run is not None:
                if run.claim is not None and (run.header.original_id != self.request.id or not self.knows_first):
                    self.claim_request.note_claim()
                    self._record_original()
                if asked.granted:
                    run.emit(OutcomeKind.CLAIMED, store=asked.seconds)
                run.attach()
                return run
        logger.warning("%s kept changing hands; it is delivered again", self.run)
        raise self._hold(_SETTLE)

    def _follow(self, asked: ClaimAnswer) -> Run | None:
        """Act on the store's answer; return ``None`` if its row changed meanwhile."""
        if isinstance(asked.answer, Claimed):
            return self._claimed(asked.answer)
        row = asked.answer.row
        return self._resume_own_claim(row) if asked.is_own(row) else self._apply_decision(row)

    def _ask(self) -> Claimed | NotClaimed:
        later = self.run.header.call is not None
        if later:
            # A later call must not claim in place of the first call under its Celery id: the first's callbacks would not be sent.
            row = self._store.find(self.message.key)
            if row is not None and not row.expired:
                return NotClaimed(row)
        answer = self._store.claim(
            self.message,
            worker=worker_label(self.request.hostname),
            lease=self.task.idempotency.lease,
            grace=_NEVER,
            adopt=self._adopted,
        )
        if later and isinstance(answer, Claimed):
            answered(self.task, self.request)  # it holds the message's row now, and needs none of its own
            self._mark(call=None, copied=False)
        return answer

    def _prefer(self, older: MessageKey) -> None:
        """Use the row under the Celery id if there is one: a worker that did not compute ids has claimed the message."""
        row = self._store.find(older)
        if row is not None and row.error != FORGOTTEN and not self._is_row_of_a_copy(row):
            self.message = self.run.message = replace(self.message, key=older)
            self._mark(message_id=self.request.id)
        self.identity = replace(self.identity, older=None)

    def _is_row_of_a_copy(self, row: Row) -> bool:
        """Return whether a row under a Celery id keeps a copy of a message with another id; see ADR 5."""
        try:
            return bool(decode_message(self.task.app, row.message)[2].get("message_id") == self.identity.message_id)
        except UndecodableError:  # a row that succeeded keeps no message
            return False

    def _apply_decision(self, row: Row) -> Run | None:
        """Carry out the decision on the row found; return ``None`` if the row changed or is to be claimed: ask again."""
        if row.task_id == self.request.id and row.ran_task_id not in (None, self.request.id):
            # A copy has run, or runs, in place of this first message, and recorded it (see _record_original).
            self._mark(copied=True)
        decision = decide_delivery(row, self._delivery(row), self.task.idempotency.delivery)
        match decision.action:
            case DeliveryAction.REFUSE:  # pragma: no cover - decided before the row was read: see `admit`
                raise AssertionError(decision)
            case DeliveryAction.CLAIM:
                if row.status is Status.PENDING:
                    self.message = replace(self.message, attempt=max(row.attempt, self.request.retries or 0))
                elif row.rejected_before is not None:
                    # Back from a dead-letter queue: make it pending, so that the next attempt claims it.
                    self._store.resubmit(row, self._adopted())
                return None
            case DeliveryAction.HOLD:
                raise self._held(row, decision)
            case DeliveryAction.TAKE_OVER:
                return self._take_over(row)
            case DeliveryAction.TAKE_OVER_AND_REPLAY:
                self._wait_for_the_chord()
                return self._take_over_and_replay(row)
            case DeliveryAction.ABANDON:
                self._abandon(row)
            case DeliveryAction.CANCEL:
                # An earlier delivery was discarded while the owner lived; the owner has died since.
                if self._store.abandon(row, error=row.error or ABANDONED, unique_for=self.task.idempotency.unique_for):
                    self.run.emit(OutcomeKind.CANCELLED, row, reason=reason_of(row.error or ABANDONED))
            case DeliveryAction.SKIP:
                self._store.count_duplicate(row.key)
                answered(self.task, self.request)
                logger.info("%s is skipped: it is %s already", self.run, row.status)
                self.run.emit(OutcomeKind.SKIPPED, row)
                running = row.status is not Status.DONE and self._is_of(row)
                raise DuplicateIgnored(f"{self.run} is a duplicate: it is {row.status}", row.key, "skipped", running)
            case DeliveryAction.REPLAY:
                self._wait_for_the_chord()
                return self._replay(row)
            case DeliveryAction.RAISE_FAILED:
                error = self._first_error(row)
                self._store.count_duplicate(row.key)
                self.run.emit(OutcomeKind.REPLAYED, row, reason="failure")
                raise error
            case DeliveryAction.RAISE_PROCESSING:
                self._store.count_duplicate(row.key)
                self.run.emit(OutcomeKind.SKIPPED, row, reason="raise_processing")
                raise AlreadyProcessingError(row.key.message_id, decision.delay)
            case DeliveryAction.RAISE_MISMATCH:
                self.run.emit(OutcomeKind.MISMATCHED, row)
                raise MessageMismatchError(row.key.message_id, row.key.task_name)
            case DeliveryAction.FORBID:  # pragma: no cover - what is discarded does not come here
                raise AssertionError("a delivery that is discarded reaches no task")
            case _:  # pragma: no cover - the type checker proves it away
                assert_never(decision.action)
        return None

    def _abandon(self, row: Row) -> None:
        """Fail a message whose owner's lease ran out, unless its row changed.

        Raises:
            AlreadyFailedError: This delivery ended the message.
        """
        unique_for = self.task.idempotency.unique_for
        self._record_original()
        if self._store.abandon(row, error=ABANDONED, unique_for=unique_for):
            self.run.move_to(run_state.Finished(self.run.claim))
            self.run.attach()  # this delivery has ended the message: its handlers are called
            self.run.emit(OutcomeKind.ABANDONED, row, reason="abandoned")
            raise AlreadyFailedError(row.key.message_id, ABANDONED)

    def _record_original(self) -> None:
        """Record the original under its own key when a copy finishes first, so that its caller still gets an answer.

        Otherwise the original's only record is the copy's row, which is never published again once it is done. If the broker then lost the
        original, its caller and the rest of its chain or chord would get no answer. See ADR 5.
        """
        row = self._store.find(self.message.key)
        if row is None:
            return
        self._note_first(row)
        if row.task_id == self.request.id or self.identity.node is not None:
            return
        own = Header.new(row.key, row.task_id).row_of_its_own
        if own == row.key or not self._is_message_of(row.task_id, row):
            return
        self._store.record(
            NewMessage(
                key=own,
                task_id=row.task_id,
                queue=row.queue,
                fingerprint=row.fingerprint,
                attempt=row.attempt,
                message=row.message,
            )
        )

    def _note_first(self, row: Row) -> None:
        """Note the first Celery id: it identifies the body's calls in this attempt and in later ones."""
        # The header of a message requeued under a new id has the first one; its row has only the new one.
        renamed = self.run.header.original_task_id if row.task_id == self.request.id else None
        first = renamed or row.task_id
        self._mark(
            original_task_id=None if first == self.request.id else first,
            trace=trace_of(row.message) or self.run.header.trace,
        )

    def _mark(self, **changes: Any) -> None:
        """Update the headers, which a retry and a held copy carry on."""
        self.run.header = replace(self.run.header, **changes)
        self.request.headers = self.run.header.write(self.request.headers)

    def _is_message_of(self, task_id: str, row: Row) -> bool:
        """Return whether the row's message was sent under this Celery id; after a copy's retry it is the copy's."""
        try:
            return bool(decode_message(self.task.app, row.message)[2].get("task_id") == task_id)
        except UndecodableError as error:
            logger.warning("the message that was first sent as %s cannot be kept: %s", self.run, error)
            return False

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _claimed(self, claimed: Claimed, row: Row | None = None) -> Run:
        # An older copy continues with the row's attempt, so that its retries do not start over.
        attempt = self.message.attempt if row is None else max(self.message.attempt, row.attempt)
        self.message = self.run.message = replace(self.message, attempt=attempt)
        self.request.retries = attempt
        self.run.move_to(run_state.Claimed(claimed.claim))
        self.run.adopt = self._adopted
        return self.run

    def _resume_own_claim(self, row: Row) -> Run | None:
        mine = Claimed(Claim(row.key, row.token))
        self._note_first(row)
        self.run.asked += min(row.lease_left - self.task.idempotency.lease, 0.0)  # it was asked for that much earlier
        claimed = self._claimed(mine, row) if row.lease_left > 0 else self._take_over(row)
        if claimed is not None and row.processed_status is ProcessedStatus.SUCCESS:
            return self._replay_claimed(row)
        return claimed

    def _take_over(self, row: Row) -> Run | None:
        claimed = self._store.take_over(
            row,
            task_id=self.message.task_id,
            worker=worker_label(self.request.hostname),
            lease=self.task.idempotency.lease,
            attempt=self.message.attempt,
        )
        if claimed is None:
            return None
        self._note_first(row)
        logger.warning("%s is taken over from %s, whose lease ran out", self.run, row.worker)
        taken = self._claimed(claimed, row)
        taken.emit(OutcomeKind.TAKEN_OVER, row)
        return taken

    def _take_over_and_replay(self, row: Row) -> Run | None:
        return None if self._take_over(row) is None else self._replay_claimed(row)

    def _replay_claimed(self, row: Row) -> Run:
        claim, value = self.run.claim, self._stored_value(row)
        assert claim is not None, "a recovery point is replayed by its owner"
        if value is _NOTHING:
            # The body has taken effect, so it must not run again.
            error = "abandoned: its result could not be kept, so what waits on it cannot be served"
            if self._store.fail(claim, error=error, unique_for=self.task.idempotency.unique_for):
                self.run.emit(OutcomeKind.ABANDONED, row, reason="abandoned")
            raise AlreadyFailedError(row.key.message_id, error)
        self.run.move_to(run_state.Checkpointed(claim, value))
        self.run.emit(OutcomeKind.REPLAYED, row)
        return self.run

    def _wait_for_the_chord(self) -> None:
        """Hold the message while another worker, even one that died, still has the claim to send its chord's body."""
        seconds = 0.0 if self.request.is_eager else claimed_for(self.task, self.request)
        if seconds:
            raise self._hold(seconds)

    def _replay(self, row: Row) -> Run:
        value = self._stored_value(row)
        if value is _NOTHING:
            value = self._first_result(row)
        self._store.count_duplicate(row.key)
        self.run.move_to(run_state.Replayed(value))
        self.run.emit(OutcomeKind.REPLAYED, row)
        return self.run

    def _first_error(self, row: Row) -> BaseException:
        """Return the error for a copy of a failed message: the stored one, if it ran under the copy's own Celery id.

        Raises:
            Ignore: That error may not be stored yet, and the copy must not overwrite it. The copy comes again.
        """
        if row.ran_task_id == self.request.id and self._backend_tells:
            if self._result_is_ready():
                with self._asking_the_backend():
                    stored = self.task.AsyncResult(self.request.id).result
                if isinstance(stored, Exception):
                    return stored
            elif row.processed_timestamp and row.read_at - row.processed_timestamp < _OWN_RESULT_WITHIN:
                raise self._hold(_SETTLE, row)
        return AlreadyFailedError(row.key.message_id, row.error)

    def _first_result(self, row: Row) -> Any:
        """Return the result backend's result for the id under which the body ran; for when the queue log kept none."""
        first = self.task.AsyncResult(row.ran_task_id or row.task_id)
        with self._asking_the_backend():
            _ = first.state  # cached once it is final
        if first.state == states.SUCCESS:
            return first.result
        if first.state in states.READY_STATES:
            raise AlreadyFailedError(row.key.message_id, describe(first.result))
        if row.error == NoResultReason.REPLACED and not self.request.is_eager:
            # The task that replaced it has not answered yet.
            raise self._hold(self.task.idempotency.lease / 2)
        logger.warning("%s is replayed as None: its result was not kept, and the backend has none", self.run)
        return None

    def _stored_value(self, row: Row) -> Any:
        if row.result is None:
            return _NOTHING
        try:
            return decode_result(self.task.app, row.result)
        except UndecodableError as error:
            logger.warning("the stored result of %s cannot be read: %s", self.run, error)
            return _NOTHING

    # -- holding -------------------------------------------------------------------------------------------------------

    def hold_behind(self, row: Row | None) -> Exception:
        """Hold the message until after the delivery that took its place. ``None`` for a row that the store has forgotten."""
        if row is None:
            return self._hold(_SETTLE)
        if self.run.header.row_of_its_own != row.key:
            self._mark(copied=True)  # its own row ends when its caller is answered
        return self._held(row, DeliveryDecision(DeliveryAction.HOLD, max(row.lease_left, row.available_in, 0.0)))

    def _held(self, row: Row, decision: DeliveryDecision) -> Exception:
        if self.request.is_eager:
            # No broker can hold it, and the caller is in this process.
            return AlreadyProcessingError(row.key.message_id, decision.delay)
        # Most owners end long before their lease does, and a caller may wait for this copy's result.
        holds = self.run.header.holds
        delay = hold_delay(decision.delay, holds)
        # If the id is free again before the copy comes back, this still identifies it as a copy.
        first = self.run.header.original_task_id or (None if row.task_id == self.request.id else row.task_id)
        self._mark(holds=holds + 1, original_task_id=first)
        return self._hold(delay, row)

    def _is_of(self, row: Row) -> bool:
        """Return whether this copy has the Celery id that the row was recorded under or ran under."""
        return self.request.id in (row.task_id, row.ran_task_id)

    def _hold(self, delay: float, row: Row | None = None) -> Exception:
        """Publish a delayed copy, so that this one can be acknowledged.

        Nothing is published to a fanout exchange again, because each worker would get a copy. ``_give_back`` handles such messages, and
        those that cannot be published.

        On Redis a restored copy shares its delivery tag with the running original: acknowledging either deletes the broker's
        only copy. The delayed copy is a separate message, published before the acknowledgement.
        """
        countdown = hold_countdown(self.task.app, delay)
        if self.identity.node is not None:
            return self._give_back(row)
        logger.info("%s is held for %.1f s", self.run, countdown)
        try:
            publish_copy(self.task, self.request, self.run.header.message_id, countdown)
        except Exception as error:  # noqa: BLE001 - after any error: acknowledged without its copy, the message would be lost
            logger.error("%s cannot be held by publishing a copy: %r", self.run, error)
            return self._give_back(row)
        self.run.emit(OutcomeKind.HELD, row, delay=countdown)
        running = row is None or self._is_of(row)
        return DuplicateIgnored(
            f"{self.run} is held for {countdown:.1f} s", self.message.key, "held", running, countdown=countdown
        )

    def _give_back(self, row: Row | None) -> Exception:
        """Give back a message that cannot be held by publishing a copy: to the broker if not yet acknowledged, else to its row."""
        if self.task.acks_late and (self.identity.node is None or row is None):
            time.sleep(_SETTLE)  # the broker delivers it again at once
            back: Exception = Reject("it is given back, since it cannot be held", requeue=True)
            return back
        running = row is None or self._is_of(row)
        if self.identity.node is None:
            own = MessageKey(self.request.id, self.task.name)
            if own != self.message.key:
                # Already acknowledged: record it under its own key, so that recovery publishes it. See ADR 5.
                self._store.record(replace(self._adopted(), key=own, published=False))
            logger.error("%s is left to recovery", self.run)
        elif row is not None:
            self._store.count_duplicate(row.key)
        else:
            return StoreUnavailableError(
                f"{self.run} was broadcast and has been acknowledged, so it cannot wait for the store"
            )
        return DuplicateIgnored(f"{self.run} is left to its row", self.message.key, "skipped", running)

    # -- the delivery --------------------------------------------------------------------------------------------------

    def _delivery(self, row: Row) -> Delivery:
        awaited = not ignores_result(self.task, self.request)
        awaited = awaited and not isinstance(self.task.backend, DisabledBackend)
        failed = row.status is Status.DONE and row.processed_status is ProcessedStatus.FAILURE
        return Delivery(
            task_id=self.message.task_id,
            retries=self.request.retries or 0,
            original_task_id=self.message.original_task_id,
            fingerprint=self.message.fingerprint,
            rejected=self.run.header.rejected,
            awaited=awaited,
            canvas=waited_on(self.request),
            result_ready=awaited
            and row.status is Status.DONE
            and self._result_is_ready()
            and not self._has_callbacks_pending(failed),
            callbacks_pending=failed and unsent_errbacks(self.task.app, self.request, self._store),
            later=self._is_later(),
        )

    def _is_later(self) -> bool:
        """Return whether this is a later call under its Celery id, not answered yet. Once answered, it is a copy like any other."""
        header = self.run.header
        return header.call is not None and (
            bool(self.request.is_eager) or self._store.find(header.row_of_its_own) is not None
        )

    def _has_callbacks_pending(self, failed: bool) -> bool:
        """Return whether this copy's callbacks may still be unsent: its result is stored before they are."""
        waits = waited_on(self.request) or (failed and bool(self.request.errbacks))
        if not (self.run.header.copied and waits):
            return False
        return self._store.find(self.run.header.row_of_its_own) is not None

    @property
    def _backend_tells(self) -> bool:
        """Whether the result backend can say how this Celery id ended."""
        # An eager run has no stored result; rpc:// keeps results in the caller's queue, which a worker cannot read.
        backend = self.task.backend
        return not self.request.is_eager and bool(backend.persistent) and not isinstance(backend, DisabledBackend)

    def _result_is_ready(self) -> bool:
        if not self._backend_tells:
            return False
        with self._asking_the_backend():
            return bool(self.task.backend.get_state(self.request.id) in states.READY_STATES)

    def _adopted(self) -> NewMessage:
        """Return the full record of a message that its producer did not record."""
        request = self.request
        if request.is_eager:
            return self.message  # its arguments may not be serializable, and it is never published again
        signature = self.task.signature_from_request(request, retries=request.retries)
        options = {**signature.options, **content_of(request), "message_id": self.run.header.message_id}
        if self.identity.node is not None:
            options["exchange_type"] = FANOUT  # for recovery, which may not know the exchange
        data = encode_message(
            request.args,
            request.kwargs,
            options,
            serializer=serializer_of(self.task, options),
            trace=self.run.header.trace,
        )
        return replace(self.message, message=self.run.keeping.of(data))


_NOTHING = object()
