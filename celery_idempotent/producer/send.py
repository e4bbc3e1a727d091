"""The producer's side: record, then publish, once per message id."""

# Longer than most: it takes one call from its arguments to the broker, and each way out is a branch of the same decision.

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, assert_never

from kombu.exceptions import OperationalError

from celery_idempotent.core.decision import Call, CallAction, decide_call
from celery_idempotent.core.records import (
    Duplicate,
    Inserted,
    Row,
    Status,
)
from celery_idempotent.core.transactions import with_transactions
from celery_idempotent.errors import (
    DuplicateMessageError,
    MessageMismatchError,
    StoreError,
    StoreUnavailableError,
)
from celery_idempotent.hooks import OutcomeKind
from celery_idempotent.message.header import Header, later_call
from celery_idempotent.message.serialization import (
    without_local,
)
from celery_idempotent.producer.answers import answer_again, differs, eager_result
from celery_idempotent.producer.box import Outbox
from celery_idempotent.producer.broadcast import end_broadcast
from celery_idempotent.producer.call_options import expiring_in_workers, moment
from celery_idempotent.producer.guarded import Guarded, GuardedRun, current_run
from celery_idempotent.producer.prepared import PreparedCall
from celery_idempotent.producer.publisher import Outgoing
from celery_idempotent.producer.store_request import StoreRequest

if TYPE_CHECKING:
    from celery.result import AsyncResult


__all__ = ["Sending", "is_unrecorded", "send"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")


def send(task: Guarded, args: Any, kwargs: Any, task_id: str | None, options: dict[str, Any]) -> AsyncResult[Any]:
    """Send a call at most once under its message id.

    Args:
        task: The task to call.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        task_id: The Celery id the caller chose, if any.
        options: The other arguments of ``apply_async``.

    Returns:
        The message's AsyncResult, with ``duplicate`` set.

    Raises:
        ConfigurationError: The task is atomic and the store has no transactions, so no worker could run it.
        DuplicateMessageError: It was sent before, and the task's options ask for this error.
        MessageMismatchError: The id is known with other arguments.
        StoreUnavailableError: The store gave no answer and the call was not sent.

    Atomicity: of N concurrent calls one records and publishes. A crash between the two leaves a pending row. A later call
    of the same id publishes it again once it is older than ``idempotent_lost_after``.
    """
    if is_unrecorded(task, task_id, options):
        options.pop("message_id", None)
        result = task.publish(args, kwargs, task_id=task_id, **options)
        result.duplicate = False
        return result
    if task.idempotency.atomic:
        with_transactions(task.queue_log.store)
    return Sending(PreparedCall.of(task, args, kwargs, task_id, options)).send()


def is_unrecorded(task: Guarded, task_id: str | None, options: Mapping[str, Any]) -> bool:
    """Return whether to send a call without the guard: its task is turned off, and it does not continue a recorded message."""
    if task.idempotency.idempotent:
        return False
    header, run = Header.read(options.get("headers")), current_run(task.app)
    if header is not None and header.belongs_to(task.name, task_id):
        return False
    return run is None or run.is_unguarded or run.request.id != task_id


class Sending:
    """One prepared call, and what the store answered for it.

    Args:
        prepared: The call.
    """

    def __init__(self, prepared: PreparedCall) -> None:
        self.prepared = prepared
        self.task = prepared.task
        self.message = prepared.message
        #: The outbox that records the call and publishes it after the commit; ``None`` without one.
        self.box = prepared.box
        #: The outcome to report if the message is inserted.
        self.recorded = OutcomeKind.RECORDED
        self.request = StoreRequest(self.task, prepared.options)
        #: Seconds the store took to record the message, or to find it; ``None`` before that.
        self.seconds: float | None = None

    def send(self) -> AsyncResult[Any]:
        """Send the call; see :func:`send`."""
        try:
            return self._send()
        except BaseException:
            if (place := self.prepared.place) is not None:
                place.calls.take_back(place.position)
            raise

    def _send(self) -> AsyncResult[Any]:
        if self.prepared.call.own:
            return self._forward_own_message()
        if self.box is not None:
            return self.box.take(self)
        try:
            return self.resolve(self._record())
        except StoreUnavailableError as error:
            if self.task.queue_log.settings.on_store_error != "run":
                raise
            logger.error("%s is sent unguarded, the store gives no answer: %s", self._name, error)
            result = self._publish_now()
            self._emit(OutcomeKind.UNGUARDED)
            return result

    def _record(self) -> Inserted | Duplicate:
        began = time.monotonic()
        answer: Inserted | Duplicate = self._ask(partial(self._store.record, self.message))
        self.seconds = time.monotonic() - began
        return answer

    def resolve(self, answer: Inserted | Duplicate) -> AsyncResult[Any]:
        """Publish what was recorded, or act on the row that was found; return the call's result.

        Raises:
            DuplicateMessageError: It was found, and the task's options ask for this error.
            MessageMismatchError: It was found with other arguments.
        """
        while True:
            if not isinstance(answer, Duplicate) or (self.request.outcome_unknown and self._is_mine(answer.row)):
                return self._publish_or(self._withdraw, partial(self._emit, self.recorded))
            result = self._send_again(answer.row)
            if result is not None:
                return result
            # The row changed between the statement and the decision: ask again.
            answer = self._record()

    # -- in an outbox --------------------------------------------------------------------------------------------------

    def record_in(self, box: Outbox) -> AsyncResult[Any]:
        """Record the call in an outbox's transaction; return its result."""
        self.box = box
        return self.resolve(self._record())

    def promised(self) -> AsyncResult[Any]:
        """Return the result of a call that is recorded later; ``duplicate`` is ``None``, because it is not known yet."""
        result = self._trailed(self._result(self.message.task_id, duplicate=False))
        result.duplicate = None
        return result

    def record_together(self, calls: Sequence[Sending]) -> list[Inserted | Duplicate]:
        """Record these calls of one app, in as few statements as possible.

        Raises:
            StoreUnavailableError: The store gave no answer, and the app does not have ``idempotent_on_store_error="run"``.
        """
        began = time.monotonic()
        try:
            answers: list[Inserted | Duplicate] = self._ask(
                partial(self._store.record_all, [call.message for call in calls])
            )
        except StoreUnavailableError as error:
            if self.task.queue_log.settings.on_store_error != "run":
                raise
            logger.error("%d calls are sent unguarded, the store gives no answer: %s", len(calls), error)
            for call in calls:
                call.recorded = OutcomeKind.UNGUARDED
            return [Inserted()] * len(calls)
        seconds = time.monotonic() - began
        for call in calls:
            call.request.outcome_unknown, call.seconds = self.request.outcome_unknown, seconds
        return answers

    def taken_back(self) -> bool:
        """Withdraw the call if it was recorded and not published; return whether the store confirmed it."""
        try:
            self._withdraw()
        except StoreError as error:
            logger.warning("%s may have been recorded, and is not taken back: %s", self._name, error)
            return False
        return True

    def _send_again(self, row: Row) -> AsyncResult[Any] | None:
        """Act on a call whose id is taken; return ``None`` if the row changed or is free again: record anew."""
        action = decide_call(row, self._call_against(row), self.task.idempotency.call)
        match action:
            case CallAction.RECORD:
                return None
            case CallAction.RETURN_FIRST:
                self._count_duplicate()
                self._emit(OutcomeKind.DUPLICATE, row, action)
                return self._first_result(row)
            case CallAction.RAISE_DUPLICATE:
                self._count_duplicate()
                self._emit(OutcomeKind.DUPLICATE, row, action)
                raise DuplicateMessageError(row.key.message_id, row.task_id, str(row.status))
            case CallAction.RAISE_MISMATCH:
                if self.prepared.dispatched:
                    return self._publish_now(duplicate=True)  # its consumer raises the error, under its own task id
                self._emit(OutcomeKind.MISMATCHED, row, action)
                raise MessageMismatchError(
                    row.key.message_id,
                    row.key.task_name,
                    differs(self.task, row, self.prepared.args, self.prepared.kwargs),
                )
            case CallAction.PUBLISH_COPY:
                return self._publish_copy(row)
            case CallAction.PUBLISH_AGAIN:
                # After a lost answer, the new publication time may be this call's own: publish, since an extra copy does no harm.
                # An outbox does not touch the row before the commit.
                if (
                    self.box is None
                    and not self._ask(partial(self._store.republish, row))
                    and not self.request.outcome_unknown
                ):
                    return None
                logger.warning("%s is published again: it has waited since %s", self._name, row.waiting_since)
                self._emit(OutcomeKind.DUPLICATE, row, action)
                return self._publish_now(replace(self.prepared.header, task_id=row.task_id), duplicate=True)
            case CallAction.RESUBMIT:
                if not self._ask(partial(self._store.resubmit, row, self.message)):
                    return None
                return self._publish_or(
                    partial(self._take_back_resubmission, row), partial(self._emit, OutcomeKind.RECORDED, row, action)
                )
            case CallAction.TRANSITION:  # pragma: no cover - decided before the store is asked
                raise AssertionError("a run's own message is sent on without a check")
            case _:  # pragma: no cover - the type checker proves it away
                assert_never(action)

    def _call_against(self, row: Row) -> Call:
        """Return the call, marked if the row is its own from an earlier run of the body: the first message then has its callbacks."""
        if self.prepared.place is None:
            return self.prepared.call
        call, position = self.prepared.call, self.prepared.place.position
        same = row.task_id == self.message.task_id == position.task_id
        repeated = same or row.key.message_id == position.message_id
        return replace(call, repeated=repeated, canvas=call.canvas and not same)

    def _is_mine(self, row: Row) -> bool:
        """Return whether this call wrote the row, without getting the answer: it is not published yet."""
        return row.status is Status.PENDING and row.worker is None and row.task_id == self.message.task_id

    def _forward_own_message(self) -> AsyncResult[Any]:
        """Publish the running task's own next attempt: its retry, or its replacement by itself."""
        # A retry always has a due time, so that older copies do not wait for a lost one for ever.
        message = replace(self.message, delay=self.message.delay or 0.0)
        if self.prepared.run is not None and not self.prepared.run.hand_on(message):
            # The claim is lost, and with it the right to retry; the run ends without an answer (see Run.perform).
            return self._result(self.message.task_id, duplicate=True)
        try:
            return self._publish_now()
        except OperationalError as error:
            # The broker is down. Celery drops a message whose retry it cannot publish; the row keeps it.
            if self.prepared.run is None or not self.prepared.run.leave_to_recovery(error):
                raise
            return self._result(self.message.task_id, duplicate=False)
        except Exception as error:
            if self.prepared.run is not None:
                self.prepared.run.not_handed_on(message, error)
            raise
        except BaseException as error:
            # This process has to exit, and the broker may or may not have the message.
            if self.prepared.run is not None:
                self.prepared.run.leave_to_recovery(error)
            raise

    # -- publishing ----------------------------------------------------------------------------------------------------

    def _publish_copy(self, row: Row) -> AsyncResult[Any]:
        """Publish the call under its own task id, with its own row until its consumer has answered it."""
        header = self.prepared.header.copy_of(row.task_id, self._later_call(row))
        own = header.row_of_its_own
        if own == self.message.key or self.task.app.conf.task_always_eager or self.prepared.is_broadcast:
            self._emit(OutcomeKind.DUPLICATE, row, CallAction.PUBLISH_COPY)
            return self._publish_now(replace(header, copied=False), duplicate=True)
        self._ask(partial(self._store.record, replace(self.message, key=own)))
        take_back = partial(self._store.withdraw, own, task_id=self.message.task_id)
        emit = partial(self._emit, OutcomeKind.DUPLICATE, row, CallAction.PUBLISH_COPY)
        return self._publish_or(take_back, emit, header)

    def _later_call(self, row: Row) -> str | None:
        """Return a name for a later call under a Celery id sent before; ``None`` if it may be the same call again.

        A signature that was frozen, or given a task id, may be part of several canvases. When a task sends it on, it is a later call
        unless that task, or the run it replays, may have sent it already.
        """
        if (
            self.message.task_id not in (row.task_id, row.ran_task_id)
            or self.prepared.place is not None
            or self.prepared.run is not None
        ):
            return None
        parent = current_run(self.task.app)
        if parent is not None:
            if not self.prepared.dispatched or self._is_repeated(parent):
                return None
            return parent.later_call(self.message.task_id)
        # A task without the guard may run again and repeat the call.
        return None if self.task.app.current_worker_task else later_call()

    def _is_repeated(self, parent: GuardedRun) -> bool:
        """Return whether a later call was redelivered after it was answered, so that it repeats its calls.

        If it was killed before that, it sends some of its calls as later ones again, and they are replayed. The row's age cannot tell them
        from another call's: two calls under one Celery id may be under way at once.
        """
        if parent.header.call is None or parent.request.is_eager:
            return False
        return self._store.find(parent.header.row_of_its_own) is None

    def _publish_now(
        self,
        header: Header | None = None,
        *,
        duplicate: bool = False,
        emit: Callable[[], None] | None = None,
    ) -> AsyncResult[Any]:
        header = header or self.prepared.header
        if self.box is not None:
            row = header.row_of_its_own if header.copied else header.key
            options = without_local(self.prepared.options)
            due = options.pop("eta", None)
            due = moment(self.task.app, due)
            self.box.add(Outgoing(row, self.task, self.prepared.args, self.prepared.kwargs, header, due, options, emit))
            return self._trailed(self._result(header.task_id, duplicate=duplicate))
        headers = header.write(self.prepared.options.get("headers"))
        options = {**self.prepared.options, "headers": headers, "message_id": header.message_id}
        if self.prepared.call.own:
            options = expiring_in_workers(self.task.app, options)
        result = self.task.publish(self.prepared.args, self.prepared.kwargs, task_id=header.task_id, **options)
        result.duplicate = duplicate
        if emit is not None:
            emit()
        return result

    def _publish_or(
        self, take_back: Callable[[], object], emit: Callable[[], None], copy: Header | None = None
    ) -> AsyncResult[Any]:
        """Publish, and report the outcome once it is certain: with an outbox, after its commit. On an error, take the record back."""
        try:
            result = self._publish_now(copy, duplicate=copy is not None, emit=emit)
        except BaseException:
            # After any error the caller gets it and the id is free again. If the broker has the message after all, its
            # consumer inserts the row.
            try:
                self._ask(take_back)
            except StoreError as error:
                logger.warning("%s was not published, and its row stays pending: %s", self._name, error)
            else:
                self._emit(OutcomeKind.WITHDRAWN)
            raise
        if self.prepared.is_broadcast and self.box is None:
            end_broadcast(self.task, self.message)
        return result

    def _withdraw(self) -> None:
        self._store.withdraw(self.message.key, task_id=self.message.task_id)

    def _take_back_resubmission(self, row: Row) -> None:
        self._store.cancel(
            row.key,
            task_id=self.message.task_id,
            error=row.error or "failed",
            unique_for=self.task.idempotency.unique_for,
        )

    # -- answers -------------------------------------------------------------------------------------------------------

    def _first_result(self, row: Row) -> AsyncResult[Any]:
        if self.task.app.conf.task_always_eager:
            return self._trailed(eager_result(self.task, row))
        answer_again(self.task, row)
        return self._trailed(self._result(row.task_id, duplicate=True))

    def _trailed(self, result: AsyncResult[Any]) -> AsyncResult[Any]:
        """Add the result to the calling task's trail, and return it."""
        if self.prepared.options.get("add_to_parent", True):
            parent = self.task.app.current_worker_task
            if parent:
                parent.add_trail(result)
        return result

    def _result(self, task_id: str, *, duplicate: bool) -> AsyncResult[Any]:
        result = self.task.AsyncResult(task_id)
        result.duplicate = duplicate
        return result

    def _count_duplicate(self) -> None:
        if self.box is not None:
            self.box.count(self.task.queue_log, self.message.key)
            return
        try:
            self._store.count_duplicate(self.message.key)
        except StoreUnavailableError as error:
            logger.warning("a duplicate of %s was not counted: %s", self._name, error)

    def _emit(self, kind: OutcomeKind, row: Row | None = None, reason: str | None = None) -> None:
        """Report the call's outcome to the app's hooks, if any."""
        self.task.queue_log.outcomes.emit(
            kind,
            self.message.key,
            row=row,
            task_id=self.message.task_id,
            queue=self.message.queue,
            attempt=self.message.attempt,
            reason=reason,
            store=self.seconds,
        )

    # -- the store -----------------------------------------------------------------------------------------------------

    @property
    def _store(self) -> Any:
        return self.task.queue_log.store if self.box is None else self.box.store(self.task.queue_log)

    @property
    def _name(self) -> str:
        return str(self.message.key)

    def _ask(self, ask: Callable[[], T]) -> T:
        if self.box is not None and self.box.joins:
            return ask()  # on an error, the transaction's owner decides
        return self.request.ask(ask)
