"""The row of a delivery, as the run that claims it sees it: how far the run has come, and the writes that its claim allows.

Each write is fenced by the claim's token, and waits for a store that gives no answer. One that finds the claim gone ends the run
without a result, a callback or an acknowledged outcome of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar, cast

from celery.exceptions import Ignore, SoftTimeLimitExceeded

from celery_idempotent.core import records
from celery_idempotent.core.records import Claim, MessageKey, NewMessage, NotClaimed, ProcessedStatus, Row, Status
from celery_idempotent.core.store_retry import ask_until_answered
from celery_idempotent.errors import LeaseLostError, SchemaError, StoreUnavailableError
from celery_idempotent.hooks import OutcomeKind
from celery_idempotent.producer.guarded import RUN, Guarded
from celery_idempotent.worker.delivery import worker_label
from celery_idempotent.worker.lease_renewal import LeaseRenewer
from celery_idempotent.worker.run_state import Checkpointed, Claimed, Lost, RunState, Unguarded, check_transition
from celery_idempotent.worker.unit_of_work import NotCommittedError, Setback, UnitOfWork, given_up_error
from celery_idempotent.worker.unstorable import Keeping

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_idempotent.core.store import Store

__all__ = ["ClaimedRow"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")

#: While a store is so, the end of a body waits for it. A table that is gone may be back after a restore, or after an ``init``.
_AWAY = (StoreUnavailableError, SchemaError)


class ClaimedRow:
    """What a run knows of its message's row, and writes to it."""

    def __init__(self, task: Guarded, request: Context, message: NewMessage) -> None:
        self.task = task
        self.queue_log = task.queue_log
        self.request = request
        self.message = message
        self._state: RunState = Unguarded()
        #: The transaction of an atomic body, while that runs.
        self.unit: UnitOfWork | None = None
        #: What the store takes of the result, and of the next attempt's message.
        self.keeping = Keeping()
        #: Seconds that the body took, once it has ended.
        self.ran: float | None = None
        #: Make the full record of the message, should the store have forgotten it while its body ran.
        self.adopt: Callable[[], NewMessage] | None = None
        #: When the claim was asked for, by the monotonic clock: its lease does not run out before that much later.
        self.asked = time.monotonic()

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

    # -- a claim that is gone ------------------------------------------------------------------------------------------

    def lose(self) -> NoReturn:
        """Note that the claim is gone, and end the run.

        Raises:
            Ignore: Always.
        """
        self.move_to(Lost(self.held_claim))
        self._stop()

    def stop_if_lost(self) -> None:
        """End a run whose claim is gone.

        Raises:
            Ignore: It is.
        """
        if isinstance(self.state, Lost):
            self._stop()

    def _stop(self) -> NoReturn:
        # Raised as LeaseLostError, it would be stored as this task's FAILURE over its new owner's result.
        error = LeaseLostError(self.key.message_id, self.held_claim.token)
        undone = "; what its body wrote in its transaction was rolled back" if self.task.idempotency.atomic else ""
        logger.error("%s: %s%s", self, error, undone)
        self.emit(OutcomeKind.LEASE_LOST)
        raise Ignore(str(error)) from error

    def __str__(self) -> str:
        return str(self.key)

    # -- writes --------------------------------------------------------------------------------------------------------

    @property
    def held_claim(self) -> Claim:
        """The claim, where there is one: only a claimed run writes."""
        assert self.claim is not None, "only a claimed run writes"
        return self.claim

    def write(self, what: str, ask: Callable[[], T]) -> T:
        """Ask the store to write an outcome, however long it takes: see ``idempotent_on_store_error``."""
        if self.unit is not None:
            # What is written beside an atomic body's transaction is written after it, and could not be on SQLite before.
            self.unit.roll_back()

        def write() -> T:
            return ask_until_answered(ask, f"{what} for", self, silences=_AWAY) if self.waits else ask()

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
    def waits(self) -> bool:
        """Whether the store is waited for as long as it gives no answer."""
        return not self.request.is_eager and self.on_store_error == "retry"

    def write_end(self, what: str, ask: Callable[[], bool]) -> bool:
        """Write an outcome; whether the claim still held, or could be had again."""
        return self.write(what, ask) or (self._claim_again() and self.write(what, ask))

    def _claim_again(self) -> bool:
        """Claim a message anew that the store has forgotten: what has no row was not taken over either.

        A Redis that keeps nothing was restarted, or a database was restored, and the outcome of the body that ran must not be lost with it.
        """
        adopt = self.adopt
        if adopt is None or self.write("read a message", lambda: self._store.find(self.key)) is not None:
            return False

        def claim() -> records.Claimed | NotClaimed:
            return self._store.claim(
                self.message,
                worker=worker_label(self.request.hostname),
                lease=self.task.idempotency.lease,
                grace=0.0,
                adopt=adopt,
            )

        answer = self.write("claim a forgotten message", claim)
        if not isinstance(answer, records.Claimed):
            return False
        logger.error("%s was forgotten by the store while its body ran, and is recorded again", self)
        self.detach()
        assert isinstance(self.state, (Claimed, Checkpointed)), "only these have an outcome to write"
        self.move_to(replace(self.state, claim=answer.claim))
        self.adopt, self.asked = adopt, time.monotonic()
        self.attach()
        return True

    def commit(
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
            return self.write_end(what, lambda: self.keeping.write(value, lambda kept: write(self._store, kept)))
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
            self.publish(unit)
        return held

    def publish(self, unit: UnitOfWork) -> None:
        """Publish what the body has sent."""
        try:
            unit.outbox.publish()
        except SoftTimeLimitExceeded:
            # The signal struck between; the relay publishes what was not.
            logger.warning("%s ran into its time limit behind its commit", self)

    def _commit_succeeded(self, written: Callable[[], bool]) -> bool:
        """Return whether a commit whose answer is lost did."""
        # A server that has yet to notice may still commit: it has the row until then, and a write of ours waits for it. The lease is
        # longer than any before (see `_before_another_run` in perform.py), so that it is a write.
        lease = self.task.idempotency.lease + 2 * (time.monotonic() - self.asked)
        self.write("learn how a commit went", lambda: self._store.renew([self.held_claim], lease=lease))
        return written()

    def has_succeeded(self) -> bool:
        """Return whether the row says that our body has succeeded: nobody else can have written so under its token."""
        row = self.write("read a message", lambda: self._store.find(self.key))
        return row is not None and (row.token, row.processed_status) == (self.held_claim.token, ProcessedStatus.SUCCESS)

    def is_pending(self, attempt: int) -> bool:
        """Return whether the row is where a write of ours put it whose answer was lost: pending, under our token."""
        row = self.write("read a message", lambda: self._store.find(self.key))
        return row is not None and (row.status, row.token, row.attempt) == (
            Status.PENDING,
            self.held_claim.token,
            attempt,
        )
