"""Read the options of a call: when it is due, where it goes, and whether something waits on it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery.utils.time import maybe_iso8601, maybe_make_aware

from celery_idempotent.message.identity import FANOUT, is_fanout
from celery_idempotent.message.serialization import as_moments

if TYPE_CHECKING:
    from celery import Celery

    from celery_idempotent.producer.guarded import Guarded, GuardedRun

__all__ = [
    "delay_of",
    "expiring_in_workers",
    "for_later",
    "is_dispatched",
    "is_waited_on",
    "kept",
    "moment",
    "routed_options",
]

_SCALARS = (str, bytes, int, float, bool, type(None))


def delay_of(task: Guarded, options: Mapping[str, Any]) -> float | None:
    """Return the seconds until a call is due by its ``countdown`` or ``eta``; ``None`` for at once."""
    if options.get("countdown"):
        return float(options["countdown"])
    due = moment(task.app, options.get("eta"))
    return None if due is None else float((due - task.app.now()).total_seconds())


def for_later(app: Celery, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a call that is published later, maybe by another process, with what Celery would add from this context."""
    later = as_moments(options, app.now())
    parent = app.current_worker_task
    if parent:
        later.setdefault("root_id", parent.request.root_id or parent.request.id)
        later.setdefault("parent_id", parent.request.id)
    return later


def expiring_in_workers(app: Celery, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a message that has a row already: it expires by Celery's header only, not in the broker too.

    RabbitMQ drops what has expired, and the row would wait for ever. A worker ends both.
    """
    expires = options.get("expires")
    if expires is None or app.conf.task_protocol == 1:  # the first protocol has no headers
        return dict(options)
    expires = as_moments({"expires": expires}, app.now())["expires"]
    text = expires if isinstance(expires, str) else expires.isoformat()
    kept = {name: value for name, value in options.items() if name != "expires"}
    return {**kept, "headers": {**(options.get("headers") or {}), "expires": text}}


def kept(value: Any) -> Any:
    """Return a copy of arguments, which their caller may change before they are published."""
    items = value.values() if isinstance(value, Mapping) else value or ()
    return value if all(isinstance(item, _SCALARS) for item in items) else deepcopy(value)


def moment(app: Celery, eta: Any) -> datetime | None:
    """Return when a call is due by its ``eta``, which may be text; ``None`` for at once."""
    return None if not eta else maybe_make_aware(maybe_iso8601(eta), app.timezone)


def is_waited_on(task_id: str | None, options: Mapping[str, Any]) -> bool:
    """Return whether something else waits on a call under its own task id.

    A worker that dispatches the last task of a chain passes an empty ``chain``. A chord's body, like all that was frozen in a
    canvas, has a fixed id together with a ``reply_to``, which a plain call never has.
    """
    if any(options.get(name) for name in ("link", "link_error", "chord", "group_id")):
        return True
    return options.get("chain") is not None or (task_id is not None and bool(options.get("reply_to")))


def is_dispatched(task: Guarded, run: GuardedRun | None, task_id: str | None, options: Mapping[str, Any]) -> bool:
    """Return whether Celery makes a call after a task has run: the next task of a chain, a link, an errback, a chord's body.

    Only Celery passes the parent's id. A chord's body has a fixed id instead, and is sent by a worker.
    """
    if run is not None and run.in_body:
        return False
    if options.get("parent_id"):
        return True
    return task_id is not None and bool(options.get("reply_to")) and bool(task.app.current_worker_task)


def routed_options(task: Guarded, args: Any, kwargs: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a call together with the task's own, and with the destination that the app's routes give it."""
    if task.app.conf.task_always_eager:
        return dict(options)
    own = {name: value for name, value in task._get_exec_options().items() if value is not None}  # noqa: SLF001 - as apply_async does
    routed: dict[str, Any] = task.app.amqp.router.route({**own, **options}, task.name, args, kwargs, task)
    queue = routed.get("queue")
    if routed.get("exchange"):
        exchange = getattr(routed["exchange"], "name", routed["exchange"])
        if is_fanout(task.app, exchange):
            routed["exchange_type"] = FANOUT
    elif getattr(getattr(queue, "exchange", None), "type", None) == FANOUT:
        routed["exchange_type"] = FANOUT
    if queue is not None:
        # Use a Broadcast's alias; the queue's name differs in each process.
        routed["queue"] = str(getattr(queue, "alias", None) or getattr(queue, "name", queue))
    if "serializer" not in options:
        routed.pop("serializer", None)  # the row's message has it
    return routed
