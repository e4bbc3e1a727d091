"""One guarded run: from the claim to the outcome.

A run is an attribute of Celery's request while the request is traced. Its writes to the row are in its base, ``ClaimedRow``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, assert_never, cast

from celery import Task
from celery.exceptions import Ignore, Retry
from kombu.exceptions import EncodeError

from celery_idempotent.core import records
from celery_idempotent.core.records import NewMessage, NoResultReason
from celery_idempotent.errors import StoreError
from celery_idempotent.hooks import OutcomeKind, reason_of
from celery_idempotent.message.canvas_ids import Calls, derived
from celery_idempotent.message.header import Header
from celery_idempotent.message.serialization import encode_message, encode_result
from celery_idempotent.producer.guarded import RUN, Guarded, current_run
from celery_idempotent.worker.body_end import BodyEnd, Completed, Failed, Ignored, Released, Retried, end_as_seen
from celery_idempotent.worker.claimed_row import ClaimedRow
from celery_idempotent.worker.delivery import describe, waited_on, worker_label
from celery_idempotent.worker.run_state import Checkpointed, Claimed, Finished, HandedOn, Lost, Unguarded
from celery_idempotent.worker.steps import RowSteps
from celery_idempotent.worker.unstorable import refused_by_backend

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context

    from celery_idempotent.core.store import Store

__all__ = ["Passage", "Run"]

logger = logging.getLogger("celery_idempotent")

#: What is kept of a message that was given back where there is no broker. Its id is free, so that the next call runs.
_NO_BROKER = "rejected with requeue=True: an eager call has no broker that brings it back"


class Passage(StrEnum):
    """How deep a run is in its chain of calls: the guard, then each ``__call__`` of the task's classes, then the body."""

    OUTSIDE = "outside"  # no ``__call__`` yet
    CALLED = "called"  # the guard runs the first ``__call__``
    IN_BODY = "in_body"  # Celery's own ``__call__``, the last one, runs the body


class Run(ClaimedRow):
    """The run of a delivery."""

    def __init__(self, task: Guarded, request: Context, message: NewMessage, header: Header) -> None:
        super().__init__(task, request, message)
        #: The message's header, completed by what its row says.
        self.header = header
        #: Whether the body is replacing itself by another task under the same task id.
        self.replacing = False
        self.passage = Passage.OUTSIDE

    @classmethod
    def of(cls, request: Context | None) -> Run | None:
        """Return the run of a request, if it was admitted."""
        return cast("Run | None", getattr(request, RUN, None))

    @classmethod
    def current(cls, app: Celery) -> Run | None:
        """Return the run of the task that this thread executes."""
        return cast("Run | None", current_run(app))

    def later_call(self, task_id: str) -> str | None:
        """Return the name for a call that Celery sends after this run, if its Celery id was sent before.

        Returns:
            The same name each time; ``None`` if an earlier run of the same message may have sent the call.
        """
        if self.header.call is None and self.ran is None:
            return None
        return f"again:{derived(self.header.call or self.request.id, task_id)}"

    @cached_property
    def calls(self) -> Calls:
        """The calls that the body makes."""
        return Calls(self.key, self.header.original_id, self.message.attempt - self.header.worker_lost_retries)

    @cached_property
    def steps(self) -> RowSteps:
        """The steps that the body takes."""
        return RowSteps(self, self.header)

    @property
    def given_id(self) -> str | None:
        """The message id that came with the message, as its property."""
        properties = self.request.properties
        given = properties.get("message_id") if isinstance(properties, Mapping) else None
        return given if isinstance(given, str) else None

    @property
    def in_body(self) -> bool:
        """Whether the body has not ended yet."""
        return isinstance(self.state, (Unguarded, Claimed, HandedOn))

    @property
    def waited_on(self) -> bool:
        """Whether anything follows the body's return: callbacks, a chain, a chord, or the task's own ``on_success``."""
        return waited_on(self.request) or type(self.task).on_success is not Task.on_success

    # -- the end of the body -------------------------------------------------------------------------------------------

    def end(self, end: BodyEnd) -> None:
        """Write how the body ended, and move to the state that follows.

        Raises:
            EncodeError: The result backend cannot take the value, so the message has failed.
            Ignore: The claim was lost. (After :class:`Retried`, the state shows that instead.)
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
            case _:  # pragma: no cover - the type checker proves that it is unreachable
                assert_never(end)

    def _complete(self, end: Completed) -> None:
        waited_on = self.waited_on and not end.dispatched
        wanted = self.task.idempotency.keep_result or waited_on
        result = encode_result(self.task.app, end.value, trace=self.header.trace) if wanted else None
        refusal = (
            None if result is not None or end.dispatched else refused_by_backend(self.task, self.request, end.value)
        )
        if refusal is not None:
            self._finish(self._failed(describe(refusal)))
            raise refusal
        if not waited_on:
            self._finish(self._completed(result))
            return
        # Callbacks are sent after we return. Until they are known to be sent, the row has a recovery point.
        # On SQLite, a writing transaction locks out all other writes, also renewals. So give a full lease here.
        lease = None if self.unit is None else self.task.idempotency.lease
        held = self.commit(
            "note a recovery point",
            result,
            lambda store, kept: store.checkpoint(self.held_claim, result=kept, lease=lease),
            self.has_succeeded,
        )
        if not held:
            self.lose()
        self.move_to(Checkpointed(self.held_claim, end.value))

    def _release(self) -> None:
        if self.request.is_eager:
            held = self.write_end(
                "end a message that was given back",
                lambda: self._store.fail(self.held_claim, error=_NO_BROKER, unique_for=0.0),
            )
            if held:
                self.emit(OutcomeKind.FAILED, reason="rejected")
            self._finish(held)
            return
        held = self.write_end("release a message", lambda: self._store.release(self.held_claim))
        held = held or self.is_pending(self.message.attempt)
        if held:
            self.emit(OutcomeKind.RETRIED, reason="rejected")
        self._finish(held)
        if not self.task.acks_late:
            # The broker has its acknowledgement, and does not bring it back.
            self.write(
                "have a message relayed", lambda: self._store.not_published(self.key, token=self.held_claim.token)
            )

    def _completed(self, result: bytes | None, note: NoResultReason | None = None) -> bool:
        unique_for, began = self.task.idempotency.unique_for, time.monotonic()
        held = self.commit(
            "record a success",
            result,
            lambda store, kept: store.complete(
                self.held_claim,
                result=kept,
                note=note or (NoResultReason.UNKEPT if self.keeping.refused else None),
                unique_for=unique_for,
            ),
            self.has_succeeded,
        )
        if held:
            self.emit(OutcomeKind.COMPLETED, reason=note, store=time.monotonic() - began)
        return held

    def _failed(self, error: str) -> bool:
        unique_for, began = self.task.idempotency.unique_for, time.monotonic()
        held = self.write_end(
            "record a failure", lambda: self._store.fail(self.held_claim, error=error, unique_for=unique_for)
        )
        if held:
            self.emit(OutcomeKind.FAILED, reason=reason_of(error), store=time.monotonic() - began)
        return held

    def _finish(self, held: bool) -> None:
        if not held:
            self.lose()
        self.move_to(Finished(self.held_claim))

    # -- what follows the body -----------------------------------------------------------------------------------------

    def end_as_seen(self, state: str | None, outcome: Any) -> None:
        """End a claim that the guard has not ended, by the outcome in Celery.

        Args:
            state: Celery's state of the run. ``None`` if the process is about to exit, which the worker's request handles.
            outcome: The return value, or the exception.
        """
        if not isinstance(self.state, Claimed) or state is None:
            return
        logger.error(
            "%s was still claimed when Celery had finished with it, and ends with Celery's state, %s: either its before_start raised, "
            "or something calls its body without the guard",
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
        """Complete a checkpointed run, after its callbacks and result were sent."""
        if isinstance(self.state, Checkpointed):
            self._end(self._completed(None))

    def not_dispatched(self, error: BaseException | None) -> None:
        """Handle a checkpointed run whose callbacks or result could not be sent.

        Args:
            error: The reason, if known.
        """
        if not isinstance(self.state, Checkpointed):
            return
        if isinstance(error, EncodeError):  # no later attempt can succeed
            self._end(self._failed(describe(error)))
        else:
            logger.error(
                "%s ran, but its callbacks or result were not sent; a later delivery sends them: %r", self, error
            )

    def _end(self, held: bool) -> None:
        self.move_to(Finished(self.held_claim) if held else Lost(self.held_claim))
        if not held:
            self.emit(OutcomeKind.LEASE_LOST)

    # -- handing on ----------------------------------------------------------------------------------------------------

    def hand_on(self, message: NewMessage) -> bool:
        """Move the row to this message's next attempt, just before that is published.

        Returns:
            Whether the claim still held; if not, do not publish.
        """
        if isinstance(self.state, Unguarded):
            return True
        if not isinstance(self.state, Claimed):
            return False

        def hand_on(store: Store) -> bool:
            return store.retry(self.held_claim, replace(message, message=self.keeping.of(message.message)))

        def handed_on() -> bool:
            return self.is_pending(message.attempt)

        if self.replacing:  # by the same task: commit the body's writes so far
            held = (
                self.commit("hand a message on", message.message, lambda store, _: hand_on(store), handed_on)
                or handed_on()
            )
        else:
            wrote = partial(self.keeping.write, message.message, lambda _: hand_on(self._store))
            held = self.write_end("hand a message on", wrote) or handed_on()
        self.move_to(HandedOn(self.held_claim) if held else Lost(self.held_claim))
        if held:
            self.emit(OutcomeKind.RETRIED, attempt=message.attempt, reason="replaced" if self.replacing else None)
        self.detach()
        return held

    def leave_to_recovery(self, error: BaseException) -> bool:
        """Leave publishing the next attempt to recovery, because the broker did not take it, or may not have.

        Returns:
            Whether there is a row from which it can be published.
        """
        if not isinstance(self.state, HandedOn):
            return False
        logger.error("%s continues when recovery can publish it: %r", self, error)
        try:
            self._store.not_published(self.key, token=self.held_claim.token)
        except StoreError as unknown:
            logger.error(
                "%s has to be overtaken before recovery publishes it, since the store gives no answer: %s",
                self,
                unknown,
            )
        return True

    def not_handed_on(self, message: NewMessage, error: BaseException) -> None:
        """End the message, because its next attempt could not be published; unless a copy of it already runs."""
        if not isinstance(self.state, HandedOn):
            return

        def end() -> bool:
            again = self._store.claim(message, worker=worker_label(self.request.hostname), lease=1.0, grace=0.0)
            if not isinstance(again, records.Claimed):
                return False
            return self._store.fail(again.claim, error=describe(error), unique_for=self.task.idempotency.unique_for)

        if self.write("end a message whose retry was not published", end):
            self.emit(OutcomeKind.FAILED, reason=reason_of(describe(error)))

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
            # An eager run's arguments may be objects that no serializer takes.
            message=None
            if request.is_eager
            else encode_message(args, kwargs, options, serializer=self.task.serializer),
        )
