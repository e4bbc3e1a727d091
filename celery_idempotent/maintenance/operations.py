"""Do what the methods of a queue log ask for: find the message of a call, requeue it, forget it."""

from __future__ import annotations

import difflib
import logging
from typing import TYPE_CHECKING, Any

from kombu.exceptions import OperationalError

from celery_idempotent.core.records import FORGOTTEN, MessageKey, Row, Status
from celery_idempotent.core.requeued import Requeued
from celery_idempotent.errors import ConfigurationError, RefusedError, StoreError
from celery_idempotent.maintenance.requeue import NotRequeued, requeue
from celery_idempotent.message.canvas_ids import is_guarded
from celery_idempotent.message.serialization import dumped
from celery_idempotent.messages import CHANGED
from celery_idempotent.producer.identify import identify
from celery_idempotent.producer.relay import relay

if TYPE_CHECKING:
    from celery import Celery

    from celery_idempotent.producer.guarded import Guarded
    from celery_idempotent.queue_log import QueueLog

__all__ = ["LogOperations", "unfinished"]

logger = logging.getLogger("celery_idempotent")


class LogOperations:
    """The operations of each queue log."""

    def key_of(self, queue_log: QueueLog, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MessageKey:
        """Return the key of the message that a call with these arguments is; see :meth:`Messages.find`."""
        guarded = _guarded(queue_log.app, task)
        if guarded.idempotency.message_id is None:
            raise ConfigurationError(
                f"task {guarded.name} has no message_id, so its messages are known by the Celery ids of their calls, not by their "
                f"arguments: use find_id(task, result.message_id), or give the task a message_id"
            )
        args, kwargs = dumped(guarded, args, kwargs, {})
        key, _ = identify(guarded.idempotency, args, kwargs, message_id=None, task_id="", task_name=guarded.name)
        return key

    def requeue(self, queue_log: QueueLog, row: Row, *, publish: bool) -> Requeued:
        """Make a message wait again, and publish it; see :meth:`Messages.requeue`."""
        done = requeue(queue_log, row)
        if isinstance(done, NotRequeued):
            raise RefusedError(row.key.message_id, row.key.task_name, done.reason)
        if publish:
            try:
                relay(queue_log)
            except (StoreError, OperationalError) as error:
                logger.warning("%s was requeued and is not published yet; a worker will do it: %s", row.key, error)
                return done
            after = queue_log.store.find(row.key)
            # A worker may have taken it before the relay noted its publication.
            if after is None or after.status is not Status.PENDING or after.published_at is not None:
                return done.handed_over()
        return done

    def forget(self, queue_log: QueueLog, row: Row, *, force: bool) -> bool:
        """Empty a row; see :meth:`Messages.forget`."""
        key, reason = row.key, None if force else unfinished(row)
        if reason is not None:
            raise RefusedError(
                key.message_id,
                key.task_name,
                f"{reason}, and a copy of it would run as a new message; pass force=True if that does no harm",
            )
        if queue_log.store.forget(row):
            return True
        now = queue_log.find_id(key.task_name, key.message_id)
        if now is None or now.error == FORGOTTEN:
            return False
        raise RefusedError(key.message_id, key.task_name, CHANGED)


def unfinished(row: Row) -> str | None:
    """Return why a message is forgotten by force only; ``None`` if it has ended, or its worker died."""
    match row.status:
        case Status.PENDING:
            return "it waits to run"
        case Status.PROCESSING if row.lease_left > 0:
            return "it runs"
        case _:
            return None


def _guarded(app: Celery, task: Any) -> Guarded:
    """Return a guarded task of an app.

    Raises:
        ConfigurationError: There is none; the text names the nearest.
    """
    found = app.tasks.get(task) if isinstance(task, str) else task
    if is_guarded(found):
        guarded: Guarded = found
        return guarded
    if found is not None:
        raise ConfigurationError(f"{getattr(found, 'name', found)!s} is not a task with base=IdempotentTask")
    near = difflib.get_close_matches(task, [name for name, each in app.tasks.items() if is_guarded(each)], n=1)
    hint = f"did you mean {near[0]!r}?" if near else "import its module, or call app.loader.import_default_modules()"
    raise ConfigurationError(f"this app has no task {task!r}; {hint}")
