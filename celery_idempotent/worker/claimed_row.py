"""The claimed row of a delivery: the run's state, and the writes that its claim allows.

Each write is fenced by the claim's token, and waits for a store that does not answer. If a write finds the claim gone, the run ends
without a result, a callback or any other outcome of its own.
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
from celery_idempotent.worker.time_limits import TimeLimits
from celery_idempotent.worker.transaction_watch import Setback, given_up_error
from celery_idempotent.worker.unit_of_work import NotCommittedError, UnitOfWork
from celery_idempotent.worker.unstorable import Keeping

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_idempotent.core.store import Store

__all__ = ["AWAY", "ClaimedRow"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")

#: Errors during which a body's outcome waits for the store. A missing table may be back after a restore or an ``init``.
AWAY = (StoreUnavailableError, SchemaError)


class ClaimedRow:
    """The row of a run's message: what is known about it, and the writes to it."""

    def __init__(self, task: Guarded, request: Context, message: NewMessage) -> None:
        self.task = task
        self.queue_log = task.queue_log
        self.request = request
        self.message = message
        self.limits = TimeLimits(task, request)
        self._state: RunState = Unguarded()
        #: The transaction of an atomic body, while the body runs.
        self.unit: UnitOfWork | None = None
        #: Whether the store takes the result, or the next attempt's message.
        self.keeping = Keeping()
        #: Seconds that the body took, after it has ended.
        self.ran: float | None = None
        #: Makes the full record of the message, in case the store forgets it while the body runs.
        self.adopt: Callable[[], NewMessage] | None = None
        #: When the claim was asked for, by the monotonic clock. Its lease runs from then at the earliest.
        self.asked = time.monotonic()

    def attach(self) -> None:
        """Attach this run to its request, and keep its lease alive."""
        setattr(self.request, RUN, self)
        if self.claim is not None:
            LeaseRenewer.of(self.queue_log).hold(self.claim, self.task.idempotency.lease, asked=self.asked)

    def detach(self) -> None:
        """Stop renewing the lease, since the run is over."""
        self.adopt = None
        if self.claim is not None:
            LeaseRenewer.of(self.queue_log).let_go(self.claim)

    @property
    def state(self) -> RunState:
        """The state of the run."""
        return self._state

    def move_to(self, state: RunState) -> None:
        """Take the next state. Nothing else sets one.

        Raises:
            AssertionError: The transition is not in the table, in our tests; elsewhere it is logged.
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
        """The app's setting, but ``retry`` in place of ``run`` for an atomic body, which cannot run without the store."""
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
        """Report an outcome of the delivery to the app's hooks."""
        self.queue_log.hooks.emit(
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
        """End the run if its claim is gone.

        Raises:
            Ignore: The claim is gone.
        """
        if isinstance(self.state, Lost):
            self._stop()

    def _stop(self) -> NoReturn:
        # A LeaseLostError would be stored as this task's FAILURE, over the new owner's result.
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
        """The claim of a run that must have one, since it writes."""
        assert self.claim is not None, "only a claimed run writes"
        return self.claim

    def write(self, what: str, ask: Callable[[], T]) -> T:
        """Ask the store to write an outcome, however long it takes: see ``idempotent_on_store_error``."""
        if self.unit is not None:
            # End the atomic body's transaction before writing outside of it. SQLite would lock the write out.
            self.unit.roll_back()

        def write() -> T:
            return ask_until_answered(ask, f"{what} for", self, silences=AWAY) if self.waits else ask()

        try:
            return write()
        except SoftTimeLimitExceeded:
            # The signal interrupted the write of a finished body's outcome. The write can be repeated.
            return write()
        except AWAY as error:
            if self.on_store_error == "run":
                logger.error("could not %s for %s, so a copy of it may run again: %s", what, self, error)
                return cast("T", True)
            raise

    @property
    def waits(self) -> bool:
        """Whether writes wait until the store answers."""
        return not self.request.is_eager and self.on_store_error == "retry"

    def write_end(self, what: str, ask: Callable[[], bool]) -> bool:
        """Write an outcome; return whether the claim still held, or could be renewed after the store forgot the row."""
        return self.write(what, ask) or (self._claim_again() and self.write(what, ask))

    def _claim_again(self) -> bool:
        """Record and claim the message again if the store has forgotten it; without a row, nobody has taken it over.

        A Redis without persistence may have been restarted, or a database restored. The body's outcome must not be lost with the row.
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
        logger.error("the store forgot %s while its body ran; recorded it again", self)
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
        """Write the success of a body; for an atomic body, in its transaction, which is committed.

        Args:
            what: The action, for the log.
            value: The value that the row is to keep, if the store takes it.
            write: Calls the store's verb.
            written: Reads whether the write happened.

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
            if not (unit.watch.in_doubt and self._commit_succeeded(written)):
                again = unit.watch.gave_way is not None
                if error in refused and unit.watch.setback is not Setback.COLLIDED:
                    again = self.keeping.learn(error, kept, silent=again) or again
                raise NotCommittedError(error, again=again) from error
            logger.warning("%s was committed, although the answer to the commit was lost: %r", self, error)
            held = True
        else:
            if unit.watch.in_doubt and not written():
                raise NotCommittedError(given_up_error(), again=unit.watch.gave_way is not None)
        if held:
            self.publish(unit)
        return held

    def publish(self, unit: UnitOfWork) -> None:
        """Publish the calls of the body."""
        try:
            unit.outbox.publish()
        except SoftTimeLimitExceeded:
            # The signal interrupted the publication; the relay publishes the rest.
            logger.warning("%s ran into its time limit right after its commit", self)

    def _commit_succeeded(self, written: Callable[[], bool]) -> bool:
        """Return whether a commit succeeded whose answer was lost."""
        # A server that has not noticed the lost connection may still commit. Until then it locks the row, so a write of ours waits
        # for it. This lease is longer than any before (see `_before_another_run` in perform.py), so that the renewal does write.
        lease = self.task.idempotency.lease + 2 * (time.monotonic() - self.asked)
        self.write("find out whether a commit succeeded", lambda: self._store.renew([self.held_claim], lease=lease))
        return written()

    def has_succeeded(self) -> bool:
        """Return whether our body's success is in the row; only we can have written it under our token."""
        row = self.write("read a message", lambda: self._store.find(self.key))
        return row is not None and (row.token, row.processed_status) == (self.held_claim.token, ProcessedStatus.SUCCESS)

    def is_pending(self, attempt: int) -> bool:
        """Return whether the row is pending under our token, after a write whose answer was lost."""
        row = self.write("read a message", lambda: self._store.find(self.key))
        return row is not None and (row.status, row.token, row.attempt) == (
            Status.PENDING,
            self.held_claim.token,
            attempt,
        )
