"""Send calls while the guard is off: as plain Celery calls, which no row remembers.

The guard is off for a task with ``idempotent=False``, and for all tasks with ``idempotent_enabled = False``. The store is not asked. The
message says that it has no row, so that a worker whose guard is off too need not look for one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery.utils import uuid

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.check_id import check_message_id
from celery_idempotent.message.header import Header, mark_unrecorded
from celery_idempotent.message.serialization import dumped, encode_message, serializer_of
from celery_idempotent.producer.call_options import for_later, kept
from celery_idempotent.producer.current_outbox import current_outbox
from celery_idempotent.producer.guarded import Guarded, current_run
from celery_idempotent.producer.marked import marked

if TYPE_CHECKING:
    from celery.result import AsyncResult

    from celery_idempotent.producer.box import Outbox
    from celery_idempotent.queue_log import QueueLog

__all__ = ["is_unrecorded", "send_unrecorded", "warn_once"]

logger = logging.getLogger("celery_idempotent")


def is_unrecorded(task: Guarded) -> bool:
    """Return whether a task's calls are sent without a row: its guard is off."""
    return not task.idempotency.idempotent


def send_unrecorded(
    task: Guarded, args: Any, kwargs: Any, task_id: str | None, options: Mapping[str, Any]
) -> AsyncResult[Any]:
    """Send a call without asking the store; in an outbox, after the commit.

    Args:
        task: The task to call.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        task_id: The Celery id the caller chose, if any.
        options: The other arguments of ``apply_async``.

    Returns:
        The call's AsyncResult; ``duplicate`` is false, and ``message_id`` the id that was given, or the Celery id.

    Raises:
        ConfigurationError: The message id is not valid.
        TypeError: The arguments do not fit the body.
        kombu.exceptions.OperationalError: The broker did not take the message. In an outbox, the log says so instead.
    """
    warn_once(task.queue_log)
    options = {name: value for name, value in options.items() if name != "message_id" or value is not None}
    run = current_run(task.app)
    # A retry, or a replacement, of the running message.
    own = run is not None and run.request.id == task_id
    sent = Header.read(options.get("headers"))
    if sent is not None and sent.belongs_to(task.name, task_id):
        options["message_id"] = sent.message_id  # it was recorded, and its header goes on with it
        own = True
    else:
        options["headers"] = mark_unrecorded(options.get("headers"))
        if run is not None and own and run.key.task_name == task.name and run.given_id is not None:
            options.setdefault("message_id", run.given_id)  # Celery's retry drops properties
    if "message_id" in options:
        check_message_id(options["message_id"])
    box = None if own else _outbox(task.queue_log)
    if box is None:
        result = task.publish(args, kwargs, task_id=task_id, **options)
        return marked(result, options.get("message_id") or result.id, duplicate=False)
    # Raise here what would be too late after the commit.
    args, kwargs = dumped(task, args, kwargs, options)
    if task.typing:
        task.idempotency.signature.bind(tuple(args or ()), dict(kwargs or {}))
    encode_message(args, kwargs, {}, serializer=serializer_of(task, options))
    call = _UnrecordedCall(task, kept(args), kept(kwargs), task_id or uuid(), for_later(task.app, options))
    box.send_later(task.queue_log, call)
    return marked(task.AsyncResult(call.task_id), options.get("message_id") or call.task_id, duplicate=False)


def _outbox(queue_log: QueueLog) -> Outbox | None:
    try:
        return current_outbox(queue_log)
    except ConfigurationError as error:  # of a store that cannot be opened, on which nothing depends now
        logger.debug("there is no transaction to wait for: %s", error)
        return None


@dataclass(frozen=True, slots=True)
class _UnrecordedCall:
    """A call in an outbox."""

    task: Guarded
    args: Any
    kwargs: Any
    task_id: str
    options: Mapping[str, Any]

    def send(self) -> None:
        self.task.publish(self.args, self.kwargs, task_id=self.task_id, **self.options)

    def __str__(self) -> str:
        return f"{self.task.name}[{self.task_id}]"


class _Warned:
    """Which process has warned."""

    pid = 0


def warn_once(queue_log: QueueLog) -> None:
    """Warn of the first call that is not recorded, once in each process, if the guard is off for the whole app."""
    warned = queue_log.part(_Warned, _Warned)
    if queue_log.settings.enabled or warned.pid == os.getpid():
        return
    warned.pid = os.getpid()
    logger.warning(
        "idempotent_enabled is False: calls are sent as plain Celery calls and are not recorded, so that each repeated call and each copy runs"
    )
