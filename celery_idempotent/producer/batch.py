"""Record the calls of a block together at its end, and publish them through one producer."""

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

#: How many messages a batch records and publishes at a time: few enough to be published within ``PUBLISH_WITHIN``.
BATCH = 500


@contextmanager
def batch() -> Iterator[None]:
    """Record and publish the calls of the block at its end; see :func:`~celery_idempotent.producer.outbox.outbox`."""
    around = innermost()
    box = None if around is None else around.box
    if isinstance(box, _Batch):  # an error that leaves the outer batch drops these calls too
        with within(box):
            yield
        return
    calls = _Batch(box)
    with within(calls):
        yield
    calls.send()


class _Batch(Outbox):
    """Calls that are recorded together, in the surrounding transaction if there is one."""

    def __init__(self, around: Outbox | None) -> None:
        super().__init__(self._no_connection)
        self._around = around
        #: ``None`` as soon as they are being sent.
        self._calls: list[tuple[OutgoingCall, AsyncResult[Any]]] | None = []
        self._lock = threading.Lock()
        #: The outbox in whose transaction the calls being sent are recorded.
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
        # A thread found the block before its end, and called after it.
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
        return messages  # recorded outside of any transaction, so nothing can roll them back

    def send(self) -> None:
        """Record and publish, some hundreds at a time.

        Raises:
            ExceptionGroup: The errors of single calls.
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
                        raise  # the transaction's owner decides what happens to it
                    raise self._explained(error, len(every), sent, [sending for sending, _ in some]) from error
                sent += len(some)
        if refused:
            raise ExceptionGroup(f"{len(refused)} of {len(every)} calls of the batch were not sent", refused)

    def _explained(self, error: StoreError, count: int, sent: int, calls: Sequence[OutgoingCall]) -> StoreError:
        """Withdraw calls that may have been recorded before an error; return the error, with how many calls were sent."""
        unsent = isinstance(error, StoreUnavailableError) and error.unsent
        left = not unsent and not all(sending.taken_back() for sending in calls)
        if sent:
            progress = f"the first {sent} of the {count} calls of the batch were sent"
        else:
            progress = f"none of the {count} calls of the batch was sent"
        if left:
            progress += (
                f"{'' if sent else ' so far'}, but some of {len(calls)} were recorded and may be sent by a relay"
            )
        elif sent:
            progress += ", and no others"
        explained = type(error)(f"{error}; {progress}")
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
