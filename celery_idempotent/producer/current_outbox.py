"""Choose the outbox that takes a call: that of the block around it, or that of a framework's transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery_idempotent.producer.box import Outbox, innermost_outbox

if TYPE_CHECKING:
    from celery_idempotent.core.records import MessageKey
    from celery_idempotent.core.store.transactional import Surrounding
    from celery_idempotent.producer.guarded import UnrecordedCall
    from celery_idempotent.producer.publisher import Outgoing
    from celery_idempotent.queue_log import QueueLog

__all__ = ["current_outbox", "outbox_that_takes"]


def current_outbox(queue_log: QueueLog) -> Outbox | None:
    """Return the outbox that takes a call in this thread or asyncio task; ``None`` to send it at once."""
    return outbox_that_takes(queue_log, innermost_outbox())


def outbox_that_takes(queue_log: QueueLog, box: Outbox | None) -> Outbox | None:
    """Return the block's outbox if it takes calls of this queue log; otherwise that of the framework's transaction, if there is one."""
    return box if box is not None and box.takes(queue_log) else _surrounding_outbox(queue_log)


class _SurroundingOutbox(Outbox):
    """The calls that are published by one hook of a framework's transaction."""

    def __init__(self, surrounding: Surrounding) -> None:
        super().__init__(surrounding.connect)
        self._surrounding: Surrounding | None = surrounding

    def add(self, message: Outgoing) -> None:
        self._await_commit()
        super().add(message)

    def keep(self, call: UnrecordedCall) -> None:
        self._await_commit()
        self._unrecorded.append(call)

    def count(self, queue_log: QueueLog, key: MessageKey) -> None:
        self._await_commit()
        super().count(queue_log, key)

    def _await_commit(self) -> None:
        if self._surrounding is not None:
            self._surrounding.after_commit(self.publish)
            self._surrounding = None


def _surrounding_outbox(queue_log: QueueLog) -> Outbox | None:
    """Return what takes a call in the transaction of a framework, where the store is in its database."""
    find = getattr(queue_log.store, "surrounding", None)
    surrounding: Surrounding | None = find() if find is not None and queue_log.settings.django_outbox else None
    if surrounding is None:
        return None
    # Those that follow each other are published together.
    last = getattr(surrounding.last_hook(), "__self__", None)
    return last if isinstance(last, _SurroundingOutbox) else _SurroundingOutbox(surrounding)
