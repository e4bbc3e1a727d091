"""Facts about a delivery: who runs it, how it failed, what waits on it, and that its caller has an answer."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

from celery_idempotent.errors import StoreError
from celery_idempotent.message.header import Header

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_idempotent.producer.guarded import Guarded

__all__ = ["answered", "describe", "waited_on", "worker_label"]

logger = logging.getLogger("celery_idempotent")

_ERROR_LENGTH = 4000


def answered(task: Guarded, request: Context) -> None:
    """Note that the caller of a delivery has its answer. If it is a copy with a row of its own, recovery need not publish it again."""
    header = Header.read(request.headers)
    if header is None or not header.copied:
        return
    own = header.row_of_its_own
    try:
        task.queue_log.store.withdraw(own, task_id=header.task_id)
    except StoreError as error:
        logger.warning(
            "%s[%s] was answered, but will be published again, since its row could not be ended: %s",
            task.name,
            request.id,
            error,
        )


def waited_on(request: Context) -> bool:
    """Return whether callbacks, a chain or a chord wait on a request."""
    return bool(request.callbacks or request.chain or request.chord)


def describe(error: BaseException) -> str:
    """Return the type and text of an error, for the column ``error``."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    try:
        return f"{kind}: {error}"[:_ERROR_LENGTH]
    except Exception as broken:  # noqa: BLE001 - an error whose text fails must not hide that the body failed
        return f"{kind}, whose text raises {type(broken).__name__}"


def worker_label(hostname: str | None, pid: int | None = None) -> str:
    """Return the label of a claimant: ``host:pid``, and the thread if several tasks share a process.

    Args:
        hostname: The worker's node name.
        pid: The process that runs the body; by default this one, and the current thread.

    A thread or greenlet runs one task at a time, so a label identifies one delivery. The main process knows its child's label.
    """
    label = f"{hostname or 'local'}:{pid or os.getpid()}"
    if not label.isascii():  # a node's name comes from the command line, which may contain invalid text
        label = label.encode("utf-8", "backslashreplace").decode()
    if pid is None and threading.current_thread() is not threading.main_thread():
        label = f"{label}:{threading.get_ident()}"
    return label[-255:]
