"""Record calls by name as Celery publishes them: ``send_task``, and signatures of tasks that this process does not import."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from celery import _state, current_app, signals
from celery.app.task import Context

from celery_idempotent.core.records import Duplicate, Inserted, NewMessage
from celery_idempotent.core.store_retry import ask_again
from celery_idempotent.errors import StoreError
from celery_idempotent.hooks import OutcomeKind
from celery_idempotent.message.canvas_ids import is_guarded
from celery_idempotent.message.header import Header, is_marked_unrecorded, later_call, mark_unrecorded
from celery_idempotent.message.identity import FANOUT, type_of_exchange
from celery_idempotent.message.serialization import encode_message, serializer_of
from celery_idempotent.producer.box import block_outbox
from celery_idempotent.producer.broadcast import end_broadcast
from celery_idempotent.producer.call_options import delay_of
from celery_idempotent.producer.guarded import current_run
from celery_idempotent.producer.identify import identify
from celery_idempotent.producer.marked import marked
from celery_idempotent.producer.unrecorded import is_unrecorded, warn_once
from celery_idempotent.queue_log import QueueLog

if TYPE_CHECKING:
    from celery import Celery
    from celery.result import AsyncResult

    from celery_idempotent.core.records import Row

__all__ = ["record_calls_by_name"]

logger = logging.getLogger("celery_idempotent")

#: Parts of the body besides the arguments, in the second protocol.
_EMBEDDED = ("callbacks", "errbacks", "chain", "chord")

#: Properties that Celery derives from other options.
_MADE_BY_CELERY = frozenset(("correlation_id", "expiration", "message_id", "reply_to"))

#: Celery's native delayed delivery (`kombu.transport.native_delayed_delivery`): the prefix of its exchanges, and the number of parts
#: that it puts before a routing key.
_DELAYED, _LEVELS = "celery_delayed_", 28


def record_calls_by_name(queue_log: QueueLog) -> None:
    """Connect the app's hook for calls by name; repeating this changes nothing."""
    hooks = vars(queue_log.app).setdefault("queue_log_hooks", _PublishHook(queue_log))
    vars(queue_log.app).setdefault("send_task", partial(_send_task, queue_log.app))
    # Before 5.7, Celery confuses the same method of two objects, and connects only the first app's. A uid keeps them apart.
    signals.before_task_publish.connect(hooks.before_publish, weak=True, dispatch_uid=f"celery_idempotent {id(hooks)}")


class _PublishHook:
    """Record messages that are sent by name.

    A signal's receiver cannot stop Celery from publishing. So a duplicate sent by name is published, and its consumer resolves it.
    """

    def __init__(self, queue_log: QueueLog) -> None:
        self.app = queue_log.app
        self._queue_log = queue_log

    def before_publish(
        self,
        sender: str,
        body: Any = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
        declare: Any = None,
        exchange: Any = None,
        routing_key: str | None = None,
        **_: Any,
    ) -> None:
        # Not `app.tasks`, which would finalize an app that only sends.
        task = self.app._tasks.get(sender)  # noqa: SLF001
        if headers is None or properties is None or Header.read(headers) is not None:
            return
        if block_outbox(self._queue_log) is not None and _publishes(self.app, declare):
            logger.warning(
                "%s is published at once although in an outbox, since it is not an IdempotentTask or is called by its name: "
                "a rollback does not undo that",
                sender,
            )
        if not is_guarded(task):
            return
        if is_unrecorded(task):
            if not is_marked_unrecorded(headers) and _publishes(self.app, declare):
                warn_once(self._queue_log)
                headers.update(mark_unrecorded(None))
                _note_sent(properties.get("message_id") or headers.get("id"), duplicate=False)
            return
        # The first protocol has in the body what the second one has in the headers.
        first_protocol = isinstance(body, Mapping)
        sent: Mapping[str, Any] = body if first_protocol else headers
        if "id" not in sent or not _publishes(self.app, declare):
            return
        args, kwargs, embed = (sent["args"], sent["kwargs"], sent) if first_protocol else body
        task_id, message_id = sent["id"], properties.get("message_id")
        run = current_run(self.app)
        if run is not None and run.in_body and message_id is None and task.idempotency.message_id is None:
            message_id = run.calls.next(sender, task.idempotency.signature, args, kwargs).message_id
        key, fingerprint = identify(
            task.idempotency, args, kwargs, message_id=message_id, task_id=task_id, task_name=sender
        )
        properties["message_id"] = key.message_id
        _note_sent(key.message_id, duplicate=False)
        trace = task.queue_log.hooks.traceparent()
        header = Header.new(key, task_id, fingerprint, trace=trace)
        destination = _destination(self.app, declare, exchange, routing_key)
        options = {**_options(sent, embed, headers, properties), **destination, **_given.get()}
        options["message_id"] = key.message_id
        headers.update(header.write(None))
        queue_log = task.queue_log
        message = NewMessage(
            key=key,
            task_id=task_id,
            queue=destination.get("queue") or destination.get("routing_key"),
            fingerprint=fingerprint,
            attempt=sent.get("retries") or 0,
            delay=delay_of(task, {"eta": sent.get("eta")}),
            message=encode_message(args, kwargs, options, serializer=serializer_of(task, options), trace=trace),
        )
        try:
            policy = self.app.conf.task_publish_retry_policy or {}
            found = ask_again(lambda: queue_log.store.record(message), policy)
            if isinstance(found, Duplicate) and found.row.never_began:
                free = found.row
                if ask_again(lambda: queue_log.store.resubmit(free, message), policy):
                    found = Inserted()
            broadcast = options.get("exchange_type") == FANOUT
            if broadcast and not isinstance(found, Duplicate):
                end_broadcast(task, message)
            if isinstance(found, Duplicate) and not broadcast and (copy := self._copy(header, found.row, sent, embed)):
                ask_again(lambda: queue_log.store.record(replace(message, key=copy.row_of_its_own)), policy)
                headers.update(copy.write(None))
        except StoreError as error:
            logger.error("%s is sent without a row; its consumer will insert one: %s", key, error)
            return
        _note_sent(key.message_id, duplicate=isinstance(found, Duplicate))
        queue_log.hooks.emit(
            OutcomeKind.DUPLICATE if isinstance(found, Duplicate) else OutcomeKind.RECORDED,
            key,
            row=found.row if isinstance(found, Duplicate) else None,
            task_id=task_id,
            queue=message.queue,
            attempt=message.attempt,
            reason="by_name" if isinstance(found, Duplicate) else None,
        )

    def _copy(self, header: Header, row: Row, headers: Mapping[str, Any], embed: Mapping[str, Any]) -> Header | None:
        """Return the header for a call whose message is known; ``None`` if the call cannot be told from that message."""
        if header.task_id not in (row.task_id, header.message_id):
            return header.copy_of(row.task_id)
        waited_on = headers.get("group") or any(embed.get(name) for name in _EMBEDDED)
        if waited_on and not self.app.current_worker_task:
            return header.copy_of(row.task_id, later_call())
        return None


def _publishes(app: Celery, declare: Any) -> bool:
    """Return whether this app publishes. The signal does not say, but the queue that it declares is an object of one app."""
    if not declare:
        return bool(current_app == app)
    name = getattr(declare[0], "name", None)
    return name in app.amqp.queues and app.amqp.queues[name] is declare[0]


def _finalize(sender: str, declare: Any = None, **message: Any) -> None:
    """Bind the tasks of an app whose first act in this process is a call by name; before that it has no tasks and no hook."""
    for app in list(_state._get_active_apps()):  # noqa: SLF001 - the signal does not say which app
        if app.finalized or not app.autofinalize or "amqp" not in vars(app) or not _publishes(app, declare):
            continue
        app.finalize(auto=True)
        hooks = vars(app).get("queue_log_hooks")
        if hooks is not None:  # connected during this signal, so Celery does not call it this time
            hooks.before_publish(sender, declare=declare, **message)


signals.before_task_publish.connect(_finalize)


def _options(
    sent: Mapping[str, Any], embed: Mapping[str, Any], headers: Mapping[str, Any], properties: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of ``apply_async`` that a message was made from."""
    # Celery's own conversion from a message to options. Headers that it does not know came from the caller.
    context = Context({**sent, **{name: embed.get(name) for name in _EMBEDDED}, "reply_to": properties.get("reply_to")})
    if sent is not headers:
        context.headers = dict(headers)
    return {
        **{name: value for name, value in properties.items() if name not in _MADE_BY_CELERY},
        **context.as_execution_options(),
        "eta": sent.get("eta"),
        "ignore_result": sent.get("ignore_result"),
    }


def _destination(app: Celery, declare: Any, exchange: Any, routing_key: str | None) -> dict[str, Any]:
    """Return the destination of a message, as options of ``apply_async``."""
    name = getattr(exchange, "name", exchange)
    if not name:
        return {"queue": routing_key}
    if name.startswith(_DELAYED):
        # The delay precedes the key, in one part per level.
        routing_key = str(routing_key).split(".", _LEVELS)[-1]
        known = next((queue for queue in app.amqp.queues.values() if queue.routing_key == routing_key), None)
        return {"routing_key": routing_key} if known is None else {"queue": known.name}
    queue = declare[0] if declare else None
    if queue is not None and (queue.exchange.name, queue.routing_key) == (name, routing_key):
        return {"queue": queue.name}
    return {"exchange": name, "routing_key": routing_key, "exchange_type": type_of_exchange(app, name)}


#: Options of a call by name that its message does not show.
_given: ContextVar[Mapping[str, Any]] = ContextVar("given", default=MappingProxyType({}))


@dataclass(slots=True)
class _Sent:
    """What Celery's ``send_task`` is sending, as the signal's receiver has found out; nothing for a task without the guard."""

    message_id: str | None = None
    duplicate: bool = False


_sent: ContextVar[_Sent | None] = ContextVar("sent", default=None)


def _note_sent(message_id: str | None, *, duplicate: bool) -> None:
    sent = _sent.get()
    if sent is not None:
        sent.message_id, sent.duplicate = message_id, duplicate


def _send_task(app: Celery, *args: Any, **options: Any) -> AsyncResult[Any]:
    """Call Celery's ``send_task``; keep the serializer and compression, which Celery's signal does not report, and mark the result."""
    shown = {name: options[name] for name in ("serializer", "compression", "delivery_mode") if options.get(name)}
    sent = _Sent()
    token, other = _given.set(shown), _sent.set(sent)
    try:
        result: AsyncResult[Any] = type(app).send_task(app, *args, **options)
    finally:
        _given.reset(token)
        _sent.reset(other)
    return result if sent.message_id is None else marked(result, sent.message_id, duplicate=sent.duplicate)
