"""The producer's side: record, then publish, once per message id."""

# Longer than most: one call goes from its arguments to the broker here, and each way out of it is a branch of the same decision.

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, assert_never

from celery.utils import uuid
from kombu.exceptions import OperationalError

from celery_idempotent.core.decision import Call, CallAction, decide_call
from celery_idempotent.core.records import (
    Duplicate,
    Inserted,
    NewMessage,
    Row,
    Status,
)
from celery_idempotent.core.store_retry import ask_again
from celery_idempotent.errors import (
    DuplicateMessageError,
    MessageMismatchError,
    StoreError,
    StoreUnavailableError,
)
from celery_idempotent.hooks import OutcomeKind
from celery_idempotent.message.canvas_ids import Calls, Position
from celery_idempotent.message.header import Header, later_call
from celery_idempotent.message.identity import FANOUT
from celery_idempotent.message.serialization import (
    dumped,
    encode_message,
    serializer_of,
    without_local,
)
from celery_idempotent.producer.answers import answer_again, eager_result
from celery_idempotent.producer.box import PUBLISH_WITHIN, Outbox, current_outbox
from celery_idempotent.producer.broadcast import end_broadcast
from celery_idempotent.producer.call_options import (
    delay_of,
    for_later,
    is_dispatched,
    is_waited_on,
    kept,
    moment,
    routed_options,
)
from celery_idempotent.producer.guarded import Guarded, GuardedRun, current_run
from celery_idempotent.producer.identify import identify
from celery_idempotent.producer.publisher import Outgoing

if TYPE_CHECKING:
    from celery.result import AsyncResult


__all__ = ["Sending", "is_unrecorded", "send"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")


def send(task: Guarded, args: Any, kwargs: Any, task_id: str | None, options: dict[str, Any]) -> AsyncResult[Any]:
    """Send a call at most once under its message id.

    Args:
        task: The task that is called.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        task_id: The Celery id the caller chose, if any.
        options: The other arguments of ``apply_async``.

    Returns:
        The message's AsyncResult, with ``duplicate`` set.

    Raises:
        DuplicateMessageError: It was sent before, and the task says so.
        MessageMismatchError: The id is known with other arguments.
        StoreUnavailableError: The store gave no answer and the call was not sent.

    Atomicity: of N concurrent calls one records and publishes. Between the two a crash leaves a pending row, which a later call
    of the same id publishes again once it is older than ``idempotent_lost_after``.
    """
    if is_unrecorded(task, task_id, options):
        options.pop("message_id", None)
        result = task.publish(args, kwargs, task_id=task_id, **options)
        result.duplicate = False
        return result
    return Sending.of(task, args, kwargs, task_id, options).send()


def is_unrecorded(task: Guarded, task_id: str | None, options: Mapping[str, Any]) -> bool:
    """Return whether a call is sent as Celery would: its task is turned off, and it does not send a recorded message on."""
    if task.idempotency.idempotent:
        return False
    header, run = Header.read(options.get("headers")), current_run(task.app)
    if header is not None and header.belongs_to(task.name, task_id):
        return False
    return run is None or run.is_unguarded or run.request.id != task_id


@dataclass
class Sending:
    """One call on its way out."""

    task: Guarded
    args: Any
    kwargs: Any
    message: NewMessage
    #: What the message's header says.
    header: Header
    call: Call
    options: dict[str, Any]
    #: The guarded run that sends its own message on (retry, replace by itself), if this call does.
    run: GuardedRun | None = None
    #: Whether it is Celery that calls, behind a task that has run: that task must not pay for what is wrong with this one.
    dispatched: bool = False
    #: The calls of the guarded body that makes this one, if one does, and its place among them.
    calls: Calls | None = None
    position: Position | None = None
    #: What the call comes to if it is not found, and the seconds that the store took to tell.
    recorded: OutcomeKind = OutcomeKind.RECORDED
    took: float | None = None
    #: What the call is recorded in, to be published when that has committed.
    box: Outbox | None = None
    #: Whether the store was asked and its answer did not come, so that what this call wrote may stand, or may yet.
    outcome_unknown: bool = False
    #: The options that its message is published by.
    routed: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        task: Guarded,
        args: Any,
        kwargs: Any,
        task_id: str | None,
        options: dict[str, Any],
    ) -> Sending:
        """Identify a call and encode its message; nothing is recorded yet."""
        # As Celery says it, but before anything is recorded.
        if args is not None and not isinstance(args, (list, tuple)):
            raise TypeError(f"task args must be a list or tuple, not {type(args).__name__}")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise TypeError(f"task keyword arguments must be a mapping, not {type(kwargs).__name__}")
        options = dict(options)
        args, kwargs = dumped(task, args, kwargs, options)
        message_id = options.pop("message_id", None)
        sent = Header.read(options.get("headers"))
        run = current_run(task.app)
        mine = run is not None and run.request.id == task_id
        dispatched = is_dispatched(task, run, task_id, options)
        calls: Calls | None = None
        position: Position | None = None
        if sent is not None and sent.belongs_to(task.name, task_id):
            # A retry: of the running body, or by the parent of a worker that was lost, which has moved the row itself.
            header = sent.next_attempt()
            call = Call(header.fingerprint, own=True)
        else:
            given = task_id
            if run is not None and run.in_body and not mine:
                calls = run.calls
                position = calls.next(task.name, task.idempotency.signature, args, kwargs)
                if task_id is None:
                    task_id = position.task_id
                elif options.get("reply_to"):  # frozen in a canvas, whose ids are made anew by each run
                    options = calls.mark(options, position, task.app, run.request.id)
                    if message_id is None and task.idempotency.message_id is None:
                        message_id = position.message_id
            task_id = task_id or uuid()
            key, fingerprint = identify(
                task.idempotency, args, kwargs, message_id=message_id, task_id=task_id, task_name=task.name
            )
            replacing = mine and run is not None and run.replacing
            canvas = replacing or dispatched or is_waited_on(given, options)
            call = Call(fingerprint, canvas=canvas, own=replacing and run.key == key)  # type: ignore[union-attr]
            outcomes = task.queue_log.outcomes
            trace = None if outcomes is None else outcomes.traceparent()
            header = Header.new(key, task_id, fingerprint, trace=trace)
        box = None if call.own else current_outbox(task.queue_log)
        if box is not None:
            options = for_later(task.app, options)
            args, kwargs = kept(args), kept(kwargs)
        routed = routed_options(task, args, kwargs, options)
        message = NewMessage(
            key=header.key,
            task_id=header.task_id,
            queue=None if task.app.conf.task_always_eager else routed.get("queue") or routed.get("routing_key"),
            fingerprint=header.fingerprint,
            attempt=options.get("retries") or 0,
            delay=delay_of(task, options),
            published=box is None,
            publish_within=None if box is None else PUBLISH_WITHIN,
            message=encode_message(
                args,
                kwargs,
                {**routed, "task_id": header.task_id, "message_id": header.message_id},
                serializer=serializer_of(task, options),
                now=None if routed.get("countdown") is routed.get("expires") is None else task.app.now(),
                trace=header.trace,
            ),
        )
        return cls(
            task,
            args,
            kwargs,
            message,
            header,
            call,
            options,
            run if mine else None,
            dispatched,
            calls,
            position,
            box=box,
            routed=routed,
        )

    def send(self) -> AsyncResult[Any]:
        """Decide, and do it; see :func:`send`."""
        try:
            return self._send()
        except BaseException:
            if self.calls is not None and self.position is not None:
                self.calls.take_back(self.position)
            raise

    def _send(self) -> AsyncResult[Any]:
        if self.call.own:
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
        self.took = time.monotonic() - began
        return answer

    def resolve(self, answer: Inserted | Duplicate) -> AsyncResult[Any]:
        """Return what a call comes to whose message was recorded, or found; its result.

        Raises:
            DuplicateMessageError: It was found, and the task says so.
            MessageMismatchError: With other arguments.
        """
        while True:
            if not isinstance(answer, Duplicate) or (self.outcome_unknown and self._is_mine(answer.row)):
                return self._publish_or(self._withdraw, partial(self._emit, self.recorded))
            result = self._send_again(answer.row)
            if result is not None:
                return result
            # The row moved between the statement and the decision: ask again.
            answer = self._record()

    # -- in an outbox --------------------------------------------------------------------------------------------------

    def record_in(self, box: Outbox) -> AsyncResult[Any]:
        """Record the call in an outbox's transaction; its result."""
        self.box = box
        return self.resolve(self._record())

    def promised(self) -> AsyncResult[Any]:
        """Return the result of a call that is recorded later, and may be another's then."""
        result = self._trailed(self._result(self.message.task_id, duplicate=False))
        result.duplicate = None
        return result

    def record_together(self, calls: Sequence[Sending]) -> list[Inserted | Duplicate]:
        """Record this call and others of the same app, in as few statements as it takes.

        Raises:
            StoreUnavailableError: The store gave no answer, and the app does not say ``idempotent_on_store_error="run"``.
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
        took = time.monotonic() - began
        for call in calls:
            call.outcome_unknown, call.took = self.outcome_unknown, took
        return answers

    def taken_back(self) -> bool:
        """Take the call back if it was recorded, and not published; whether that is certain."""
        try:
            self._withdraw()
        except StoreError as error:
            logger.warning("%s may have been recorded, and is not taken back: %s", self._name, error)
            return False
        return True

    def _send_again(self, row: Row) -> AsyncResult[Any] | None:
        """Return what becomes of a call whose id is taken; ``None`` when the row moved and the decision is void."""
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
                if self.dispatched:
                    return self._publish_now(duplicate=True)  # its consumer says so, under its own task id
                self._emit(OutcomeKind.MISMATCHED, row, action)
                raise MessageMismatchError(row.key.message_id, row.key.task_name)
            case CallAction.PUBLISH_COPY:
                return self._publish_copy(row)
            case CallAction.PUBLISH_AGAIN:
                # After an answer that did not come, whose the new publication time is cannot be told; a copy too many is absorbed. In an
                # outbox the row is not touched before the commit.
                if self.box is None and not self._ask(partial(self._store.republish, row)) and not self.outcome_unknown:
                    return None
                logger.warning("%s is published again: it has waited since %s", self._name, row.waiting_since)
                self._emit(OutcomeKind.DUPLICATE, row, action)
                return self._publish_now(replace(self.header, task_id=row.task_id), duplicate=True)
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
        """Return the call, and whether the row is its own, from an earlier run of the body: then the first message has its callbacks too."""
        if self.position is None:
            return self.call
        same = row.task_id == self.message.task_id == self.position.task_id
        repeated = same or row.key.message_id == self.position.message_id
        return replace(self.call, repeated=repeated, canvas=self.call.canvas and not same)

    def _is_mine(self, row: Row) -> bool:
        """Return whether a row is what this call wrote and got no answer to: it is not published yet."""
        return row.status is Status.PENDING and row.worker is None and row.task_id == self.message.task_id

    def _forward_own_message(self) -> AsyncResult[Any]:
        """Send the running task's own message on: its retry, or its replacement by itself."""
        # A retry always has a moment from which it is due, so that older copies do not wait for a lost one for ever.
        message = replace(self.message, delay=self.message.delay or 0.0)
        if self.run is not None and not self.run.hand_on(message):
            # The claim is gone, and with it the right to retry; the run ends without a word (see Run.perform).
            return self._result(self.message.task_id, duplicate=True)
        try:
            return self._publish_now()
        except OperationalError as error:
            # The broker takes nothing now. Celery gives a message up whose retry it cannot publish; the row keeps it.
            if self.run is None or not self.run.leave_to_recovery(error):
                raise
            return self._result(self.message.task_id, duplicate=False)
        except Exception as error:
            if self.run is not None:
                self.run.not_handed_on(message, error)
            raise
        except BaseException as error:
            # This process is told to end, and the broker may have the message or not.
            if self.run is not None:
                self.run.leave_to_recovery(error)
            raise

    # -- publishing ----------------------------------------------------------------------------------------------------

    def _publish_copy(self, row: Row) -> AsyncResult[Any]:
        """Publish under its own task id, with a row of its own that lasts until its consumer has answered it."""
        header = self.header.copy_of(row.task_id, self._later_call(row))
        own = header.row_of_its_own
        if own == self.message.key or self.task.app.conf.task_always_eager or self._is_broadcast:
            self._emit(OutcomeKind.DUPLICATE, row, CallAction.PUBLISH_COPY)
            return self._publish_now(replace(header, copied=False), duplicate=True)
        self._ask(partial(self._store.record, replace(self.message, key=own)))
        take_back = partial(self._store.withdraw, own, task_id=self.message.task_id)
        emit = partial(self._emit, OutcomeKind.DUPLICATE, row, CallAction.PUBLISH_COPY)
        return self._publish_or(take_back, emit, header)

    def _later_call(self, row: Row) -> str | None:
        """Return the name of a call under a Celery id that was sent before: not the same call once more, which its consumer would skip.

        A signature that was frozen, or given a task id, may stand in several canvases. Behind a task, it is one unless that task, or
        what it replays, may have sent it already.
        """
        if (
            self.message.task_id not in (row.task_id, row.ran_task_id)
            or self.position is not None
            or self.run is not None
        ):
            return None
        parent = current_run(self.task.app)
        if parent is not None:
            if not self.dispatched or self._is_repeated(parent):
                return None
            return parent.later_call(self.message.task_id)
        # A task without the guard may be run again, and make the same call again.
        return None if self.task.app.current_worker_task else later_call()

    def _is_repeated(self, parent: GuardedRun) -> bool:
        """Return whether a later call was delivered once more after it was answered: it sends again what it has sent.

        Killed before that, it sends a part of its calls as later ones once more. They are replayed. The age of the row cannot tell these from
        another call's: two calls under one Celery id may be under way at once.
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
        header = header or self.header
        if self.box is not None:
            row = header.row_of_its_own if header.copied else header.key
            options = without_local(self.options)
            due = options.pop("eta", None)
            due = moment(self.task.app, due)
            self.box.add(Outgoing(row, self.task, self.args, self.kwargs, header, due, options, emit))
            return self._trailed(self._result(header.task_id, duplicate=duplicate))
        headers = header.write(self.options.get("headers"))
        options = {**self.options, "headers": headers, "message_id": header.message_id}
        result = self.task.publish(self.args, self.kwargs, task_id=header.task_id, **options)
        result.duplicate = duplicate
        if emit is not None:
            emit()
        return result

    def _publish_or(
        self, take_back: Callable[[], object], emit: Callable[[], None], copy: Header | None = None
    ) -> AsyncResult[Any]:
        """Publish, and tell what that comes to once it is certain: in an outbox that is behind its commit."""
        try:
            result = self._publish_now(copy, duplicate=copy is not None, emit=emit)
        except BaseException:
            # Whatever it was, the caller is told and the id is free again. Should the broker have the message after all, its
            # consumer inserts the row.
            try:
                self._ask(take_back)
            except StoreError as error:
                logger.warning("%s was not published, and its row stays pending: %s", self._name, error)
            else:
                self._emit(OutcomeKind.WITHDRAWN)
            raise
        if self._is_broadcast and self.box is None:
            end_broadcast(self.task, self.message)
        return result

    @property
    def _is_broadcast(self) -> bool:
        """Whether each worker gets the message, which is done here once it is published."""
        return self.routed.get("exchange_type") == FANOUT

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
        """Return the result, among those of the task that makes the call."""
        if self.options.get("add_to_parent", True):
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
        """Tell the app's hooks, if it has any, what became of the call."""
        outcomes = self.task.queue_log.outcomes
        if outcomes is not None:
            outcomes.emit(
                kind,
                self.message.key,
                row=row,
                task_id=self.message.task_id,
                queue=self.message.queue,
                attempt=self.message.attempt,
                reason=reason,
                store=self.took,
            )

    # -- the store -----------------------------------------------------------------------------------------------------

    @property
    def _store(self) -> Any:
        return self.task.queue_log.store if self.box is None else self.box.store(self.task.queue_log)

    @property
    def _name(self) -> str:
        return f"{self.message.key.task_name}[{self.message.key.message_id}]"

    def _ask(self, ask: Callable[[], T]) -> T:
        def note_silence() -> T:
            try:
                return ask()
            except StoreUnavailableError as error:
                self.outcome_unknown = self.outcome_unknown or not error.unsent
                error.unsent = not self.outcome_unknown  # the caller is told of the whole call
                raise

        if self.box is not None and self.box.joins:
            return ask()  # what an error makes of the transaction is its owner's affair
        try:
            return note_silence()
        except StoreUnavailableError as error:
            silence = error
        # As for a broker that is down: the app's policy, or the one of this call.
        conf, retry = self.task.app.conf, self.options.get("retry")
        if self.task.queue_log.settings.on_store_error != "retry" or not (
            conf.task_publish_retry if retry is None else retry
        ):
            raise silence
        policy = {**(conf.task_publish_retry_policy or {}), **(self.options.get("retry_policy") or {})}
        return ask_again(note_silence, policy, silence=silence)
