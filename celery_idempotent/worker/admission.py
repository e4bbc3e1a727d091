"""Admit a delivered message: claim it, or do what its row calls for."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from celery_idempotent.core import store_retry
from celery_idempotent.core.decision import Delivery, DeliveryAction, decide_delivery
from celery_idempotent.core.records import FORGOTTEN, Claimed, MessageKey, NotClaimed, Row
from celery_idempotent.errors import ConfigurationError, StoreError
from celery_idempotent.hooks import OutcomeKind
from celery_idempotent.message.identity import identity_of
from celery_idempotent.message.serialization import UndecodableError, decode_message
from celery_idempotent.worker import run_state
from celery_idempotent.worker.apply_decision import apply_decision
from celery_idempotent.worker.claim_request import ClaimAnswer, ClaimRequest
from celery_idempotent.worker.delivered_message import DeliveredMessage
from celery_idempotent.worker.delivery import answered, worker_label
from celery_idempotent.worker.hold import SETTLE, hold
from celery_idempotent.worker.record_original import record_original
from celery_idempotent.worker.run import Run
from celery_idempotent.worker.take_over import resume_own_claim, start

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_idempotent.core.store import Store
    from celery_idempotent.producer.guarded import Guarded

__all__ = ["admit"]

logger = logging.getLogger("celery_idempotent")

#: How often a row may change during one decision before the message is held instead.
_ATTEMPTS = 10

#: Seconds of grace for an older copy in the claim itself: the decision on the row says whether it runs in a retry's place, and as which attempt.
_NEVER = 1e9


def admit(task: Guarded, request: Context) -> Run:
    """Decide what to do with a delivery, and do what comes before the body.

    Args:
        task: The delivery's task.
        request: Celery's traced request.

    Returns:
        A run that holds the message or replays its result; or is unguarded, because the store gave no answer.

    Raises:
        Ignore: There is nothing to do here: it was done, or a copy was published to come again later.
        AlreadyFailedError: The first run failed; this copy's caller gets the error.
        AlreadyProcessingError: Another delivery runs, and the task has ``on_processing="raise"``.
        ConfigurationError: No store can keep its ids, headers or numbers.
        MessageMismatchError: The id is known with other arguments.
        StoreUnavailableError: The store gave no answer, and the app has ``on_store_error="raise"``.
    """
    try:
        delivered = DeliveredMessage(task, request, identity_of(task, request))
    except ConfigurationError:
        decision = decide_delivery(None, Delivery(request.id, storable=False), task.idempotency.delivery)
        assert decision.action is DeliveryAction.REFUSE, "it is decided before all"
        raise
    return delivered.run.limits.without(_Admission(delivered).decide)


class _Admission:
    """The decision about one delivery."""

    def __init__(self, delivered: DeliveredMessage) -> None:
        self.delivered = delivered
        self.task = delivered.task
        self.request = delivered.request
        self.run = delivered.run
        self.claim_request = ClaimRequest(self.request.hostname)

    @property
    def store(self) -> Store:
        return self.delivered.store

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
            raise hold(self.delivered, store_retry.REDELIVER_AFTER) from error

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
        store_retry.ask_until_answered(lambda: self.store.release(claim), "release", run)
        run.move_to(run_state.Finished(claim))
        raise hold(self.delivered, SETTLE)

    def _admit(self) -> Run:
        with self.claim_request.noting_silence():
            return self._claim_or_decide()

    def _claim_or_decide(self) -> Run:
        if self.delivered.identity.older is not None:
            self._prefer(self.delivered.identity.older)
        for _ in range(_ATTEMPTS):
            asked = self.claim_request.ask(self._ask)
            self.run.asked = asked.at
            run = self._follow(asked)
            if run is not None:
                known = run.header.original_id == self.request.id and self.delivered.knows_first
                if run.claim is not None and not known:
                    self.claim_request.note_claim()
                    record_original(self.delivered)
                if asked.granted:
                    run.emit(OutcomeKind.CLAIMED, store=asked.seconds)
                run.attach()
                return run
        logger.warning("%s kept changing hands; it is delivered again", self.run)
        raise hold(self.delivered, SETTLE)

    def _follow(self, asked: ClaimAnswer) -> Run | None:
        """Act on the store's answer; return ``None`` if its row changed meanwhile."""
        if isinstance(asked.answer, Claimed):
            return start(self.delivered, asked.answer)
        row = asked.answer.row
        return resume_own_claim(self.delivered, row) if asked.is_own(row) else apply_decision(self.delivered, row)

    def _ask(self) -> Claimed | NotClaimed:
        message, later = self.delivered.message, self.delivered.header.call is not None
        if later:
            # A later call must not claim in place of the first call under its Celery id: the first's callbacks would not be sent.
            row = self.store.find(message.key)
            if row is not None and not row.expired:
                return NotClaimed(row)
        answer = self.store.claim(
            message,
            worker=worker_label(self.request.hostname),
            lease=self.task.idempotency.lease,
            grace=_NEVER,
            adopt=self.delivered.adopted,
        )
        if later and isinstance(answer, Claimed):
            answered(self.task, self.request)  # it holds the message's row now, and needs none of its own
            self.delivered.mark(call=None, copied=False)
        return answer

    def _prefer(self, older: MessageKey) -> None:
        """Use the row under the Celery id if there is one: a worker that did not compute ids has claimed the message."""
        delivered = self.delivered
        row = self.store.find(older)
        if row is not None and row.error != FORGOTTEN and not self._is_row_of_a_copy(row):
            delivered.message = self.run.message = replace(delivered.message, key=older)
            delivered.mark(message_id=self.request.id)
        delivered.identity = replace(delivered.identity, older=None)

    def _is_row_of_a_copy(self, row: Row) -> bool:
        """Return whether a row under a Celery id keeps a copy of a message with another id; see ADR 5."""
        message_id = self.delivered.identity.message_id
        try:
            return bool(decode_message(self.task.app, row.message)[2].get("message_id") == message_id)
        except UndecodableError:  # a row that succeeded keeps no message
            return False
