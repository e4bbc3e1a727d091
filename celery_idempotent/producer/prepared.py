"""Prepare a call: resolve all that it needs before anything is recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celery.utils import uuid

from celery_idempotent.core.decision import Call
from celery_idempotent.core.records import NewMessage
from celery_idempotent.message.canvas_ids import Calls, Position
from celery_idempotent.message.header import Header
from celery_idempotent.message.identity import FANOUT
from celery_idempotent.message.serialization import dumped, encode_message, serializer_of
from celery_idempotent.producer.box import PUBLISH_WITHIN, Outbox
from celery_idempotent.producer.call_options import (
    delay_of,
    for_later,
    is_dispatched,
    is_waited_on,
    kept,
    routed_options,
)
from celery_idempotent.producer.current_outbox import current_outbox
from celery_idempotent.producer.guarded import Guarded, GuardedRun, current_run
from celery_idempotent.producer.identify import identify

__all__ = ["Place", "PreparedCall"]


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a call among those of the guarded body that makes it.

    Attributes:
        calls: The body's calls.
        position: The position of this one, with its ids, which are the same in each run of the body.
    """

    calls: Calls
    position: Position


@dataclass(frozen=True, slots=True)
class _Arguments:
    """The arguments of ``apply_async``."""

    task: Guarded
    args: Any
    kwargs: Any
    task_id: str | None
    message_id: str | None
    options: dict[str, Any]
    run: GuardedRun | None
    dispatched: bool


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """A call, with all that is known about it before the store is asked.

    Make one with :meth:`of`, which chooses among :meth:`own_message`, :meth:`from_body` and :meth:`plain`.

    Attributes:
        task: The task that is called.
        args, kwargs: Its arguments, as they are published.
        options: The other arguments of ``apply_async``.
        message: The message to record.
        header: The header to publish.
        call: The input of the decision.
        run: The guarded run, if this call forwards the run's own message (a retry, a replacement by itself).
        dispatched: Whether Celery makes the call after a task has run. An error of this call must not fail that task.
        place: The call's place in the guarded body that makes it, if one does.
        box: The outbox that takes the call; ``None`` if it is sent at once.
        is_broadcast: Whether each worker gets the message.
    """

    task: Guarded
    args: Any
    kwargs: Any
    options: dict[str, Any]
    message: NewMessage
    header: Header
    call: Call
    run: GuardedRun | None = None
    dispatched: bool = False
    place: Place | None = None
    box: Outbox | None = None
    is_broadcast: bool = False

    @classmethod
    def of(cls, task: Guarded, args: Any, kwargs: Any, task_id: str | None, options: Mapping[str, Any]) -> PreparedCall:
        """Identify a call and encode its message.

        Raises:
            TypeError: The arguments are not a list and a mapping, or do not fit the body.
            ConfigurationError: The message id is not valid, or an argument has no canonical form.
        """
        # Celery raises the same, but only after the message would have been recorded.
        if args is not None and not isinstance(args, (list, tuple)):
            raise TypeError(f"task args must be a list or tuple, not {type(args).__name__}")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise TypeError(f"task keyword arguments must be a mapping, not {type(kwargs).__name__}")
        args, kwargs = dumped(task, args, kwargs, options)
        rest = dict(options)
        message_id = rest.pop("message_id", None)
        run = current_run(task.app)
        dispatched = is_dispatched(task, run, task_id, rest)
        given = _Arguments(task, args, kwargs, task_id, message_id, rest, run, dispatched)
        sent = Header.read(rest.get("headers"))
        if sent is not None and sent.belongs_to(task.name, task_id):
            return cls.own_message(given, sent)
        if run is not None and run.in_body and run.request.id != task_id:
            return cls.from_body(given, run)
        return cls.plain(given)

    @classmethod
    def own_message(cls, given: _Arguments, sent: Header) -> PreparedCall:
        """Return a retry, of the running body or for a lost pool child. In the second case the main process has moved the row itself."""
        header = sent.next_attempt()
        return cls._encoded(given, header, Call(header.fingerprint, own=True))

    @classmethod
    def from_body(cls, given: _Arguments, run: GuardedRun) -> PreparedCall:
        """Return a call that a guarded body makes, under ids that are the same in each run of the body."""
        task, options, task_id, message_id = given.task, given.options, given.task_id, given.message_id
        calls = run.calls
        position = calls.next(task.name, task.idempotency.signature, given.args, given.kwargs)
        if task_id is None:
            task_id = position.task_id
        elif options.get("reply_to"):  # frozen in a canvas, which makes new ids in each run
            options = calls.mark(options, position, task.app, run.request.id)
            if message_id is None and task.idempotency.message_id is None:
                message_id = position.message_id
        header = _new_header(given, task_id, message_id)
        canvas = given.dispatched or is_waited_on(given.task_id, options)
        call = Call(header.fingerprint, canvas=canvas)
        return cls._encoded(given, header, call, options=options, place=Place(calls, position))

    @classmethod
    def plain(cls, given: _Arguments) -> PreparedCall:
        """Return any other call: from outside a guarded body, from Celery after a task, or from a body that replaces itself."""
        run = given.run
        replacing = run is not None and run.request.id == given.task_id and run.replacing
        header = _new_header(given, given.task_id or uuid(), given.message_id)
        canvas = replacing or given.dispatched or is_waited_on(given.task_id, given.options)
        own = replacing and run is not None and run.key == header.key
        return cls._encoded(given, header, Call(header.fingerprint, canvas=canvas, own=own))

    @classmethod
    def _encoded(
        cls,
        given: _Arguments,
        header: Header,
        call: Call,
        *,
        options: dict[str, Any] | None = None,
        place: Place | None = None,
    ) -> PreparedCall:
        task, args, kwargs, run = given.task, given.args, given.kwargs, given.run
        options = given.options if options is None else options
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
            task=task,
            args=args,
            kwargs=kwargs,
            options=options,
            message=message,
            header=header,
            call=call,
            run=run if run is not None and run.request.id == given.task_id else None,
            dispatched=given.dispatched,
            place=place,
            box=box,
            is_broadcast=routed.get("exchange_type") == FANOUT,
        )


def _new_header(given: _Arguments, task_id: str, message_id: str | None) -> Header:
    task = given.task
    key, fingerprint = identify(
        task.idempotency, given.args, given.kwargs, message_id=message_id, task_id=task_id, task_name=task.name
    )
    return Header.new(key, task_id, fingerprint, trace=task.queue_log.hooks.traceparent())
