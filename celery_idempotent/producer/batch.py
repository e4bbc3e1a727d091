"""A batch: the calls of a block are recorded together at its end, and published by one producer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from celery_idempotent.errors import (
    DuplicateMessageError,
    MessageMismatchError,
    StoreError,
    StoreUnavailableError,
)
from celery_idempotent.producer.box import Outbox, OutgoingCall, innermost, surrounding_outbox, within

if TYPE_CHECKING:
    from celery.result import AsyncResult
    from sqlalchemy import Connection

    from celery_idempotent.core.records import MessageKey
    from celery_idempotent.core.store import Store
    from celery_idempotent.producer.publisher import Outgoing
    from celery_idempotent.queue_log import QueueLog

__all__ = ["batch"]

#: Messages that a batch records and publishes in one go: few enough to be published while they are its own to publish.
BATCH = 500


@contextmanager
def batch() -> Iterator[None]:
    """Record and publish the calls of the block at its end; see :func:`~celery_idempotent.producer.outbox.outbox`."""
    around = innermost()
    box = None if around is None else around.box
    if isinstance(box, _Batch):  # whose error leaves nothing of this one either
        with within(box):
            yield
        return
    calls = _Batch(box)
    with within(calls):
        yield
    calls.send()


class _Batch(Outbox):
    """Calls that are recorded together, in the transaction around them if there is one."""

    def __init__(self, around: Outbox | None) -> None:
        super().__init__(self._no_connection)
        self._around = around
        #: ``None`` once they are being sent.
        self._calls: list[tuple[OutgoingCall, AsyncResult[Any]]] | None = []
        self._lock = threading.Lock()
        #: Whose transaction takes what is sent now.
        self._outer: Outbox | None = None

    def _no_connection(self) -> Connection:  # pragma: no cover - it has a store instead
        raise AssertionError("a batch has no connection of its own")

    @property
    def joins(self) -> bool:
        return self._outer is not None

    def take(self, sending: OutgoingCall) -> AsyncResult[Any]:
        result = sending.promised()
        with self._lock:
            if self._calls is not None:
                self._calls.append((sending, result))
                return result
        # A thread that came to the block before its end, and to its call after it.
        sending.box = late = _Batch(None)
        late.take(sending)
        try:
            late.send()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return result

    def store(self, queue_log: QueueLog) -> Store:
        return queue_log.store if self._outer is None else self._outer.store(queue_log)

    def add(self, message: Outgoing) -> None:
        if self._outer is None:
            super().add(message)
        else:
            self._outer.add(message)

    def count(self, queue_log: QueueLog, key: MessageKey) -> None:
        if self._outer is None:
            super().count(queue_log, key)
        else:
            self._outer.count(queue_log, key)

    def _still_there(self, queue_log: QueueLog, messages: list[Outgoing]) -> list[Outgoing]:  # noqa: ARG002
        return messages  # each was recorded on its own, and nothing takes that back

    def send(self) -> None:
        """Record and publish, some hundreds at a time.

        Raises:
            ExceptionGroup: Of what is wrong with single calls.
            StoreUnavailableError: The store gave no answer.
        """
        with self._lock:
            every, self._calls = self._calls or [], None
        refused: list[Exception] = []
        sent = 0
        for queue_log, group in groupby(every, lambda call: call[0].task.queue_log):
            calls = list(group)
            around = self._around
            takes = around if around is not None and around.takes(queue_log) else surrounding_outbox(queue_log)
            self._outer = None if takes is None else takes.that_commits()
            for first in range(0, len(calls), BATCH):
                some = calls[first : first + BATCH]
                try:
                    refused += self._send(some)
                except StoreError as error:
                    if self._outer is not None:
                        raise  # what becomes of the transaction is its owner's affair
                    raise self._explained(error, len(every), sent, [sending for sending, _ in some]) from error
                sent += len(some)
        if refused:
            raise ExceptionGroup(f"{len(refused)} of {len(every)} calls of the batch were not sent", refused)

    def _explained(self, error: StoreError, count: int, sent: int, calls: Sequence[OutgoingCall]) -> StoreError:
        """Return what to tell of calls whose recording was refused, or not answered: some may have been recorded, and are taken back."""
        unsent = isinstance(error, StoreUnavailableError) and error.unsent
        left = not unsent and not all(sending.taken_back() for sending in calls)
        if sent:
            told = f"the first {sent} of the {count} calls of the batch were sent"
        else:
            told = f"none of the {count} calls of the batch was sent"
        if left:
            told += f"{'' if sent else ' so far'}, but some of {len(calls)} were recorded and may be sent by a relay"
        elif sent:
            told += ", and no others"
        explained = type(error)(f"{error}; {told}")
        if isinstance(explained, StoreUnavailableError):
            explained.unsent = not (sent or left)
        return explained

    def _send(self, calls: list[tuple[OutgoingCall, AsyncResult[Any]]]) -> list[Exception]:
        refused: list[Exception] = []
        answers = calls[0][0].record_together([sending for sending, _ in calls])
        for (sending, result), answer in zip(calls, answers, strict=True):
            try:
                final = sending.resolve(answer)
            except (DuplicateMessageError, MessageMismatchError) as error:
                result.duplicate = True
                refused.append(error)
            else:
                result.id, result.duplicate = final.id, final.duplicate
        if self._outer is None:
            self.publish()
        return refused
