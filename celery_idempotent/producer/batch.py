"""Record the calls of a block together at its end, and publish them through one producer."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from celery_idempotent.errors import DuplicateMessageError, MessageMismatchError, StoreError, StoreUnavailableError
from celery_idempotent.producer.box import Outbox, OutgoingCall, innermost_outbox, within
from celery_idempotent.producer.current_outbox import outbox_that_takes
from celery_idempotent.producer.off_loop import off_the_loop

if TYPE_CHECKING:
    from celery.result import AsyncResult
    from sqlalchemy import Connection

    from celery_idempotent.core.records import MessageKey
    from celery_idempotent.core.store import Store
    from celery_idempotent.producer.guarded import UnrecordedCall
    from celery_idempotent.producer.publisher import Outgoing
    from celery_idempotent.queue_log import QueueLog

__all__ = ["awaited_batch", "batch", "record_together"]

#: How many messages a batch records and publishes at a time: few enough to be published within ``PUBLISH_WITHIN``.
BATCH = 500


@contextmanager
def batch() -> Iterator[None]:
    """Record and publish the calls of the block at its end; see :func:`~celery_idempotent.producer.outbox.outbox`."""
    with _collecting() as calls:
        yield
    if calls is not None:
        calls.send()


@asynccontextmanager
async def awaited_batch() -> AsyncIterator[None]:
    """Do the same in a coroutine, while the event loop goes on."""
    with _collecting() as calls:
        yield
    if calls is not None:
        await calls.send_off_the_loop()


@contextmanager
def _collecting() -> Iterator[_Batch | None]:
    """Yield the batch of a block, which is to be sent after it; ``None`` in another batch, which has the calls then."""
    box = innermost_outbox()
    outer = box if isinstance(box, _Batch) else None  # an error that leaves the outer batch drops these calls too
    calls = outer or _Batch(box)
    with within(calls):
        yield calls if outer is None else None


def record_together(box: Outbox, calls: Iterable[tuple[OutgoingCall, AsyncResult[Any]]], what: str) -> None:
    """Record calls that were promised, in an outbox's transaction.

    Args:
        box: The outbox.
        calls: The calls, and the results that their callers have.
        what: What they are calls of, for errors.

    Raises:
        ExceptionGroup: The errors of single calls. All others were recorded.
    """
    together = _Batch(box, what)
    for sending, result in calls:
        together.add_call(sending, result)
    together.send()


class _Batch(Outbox):
    """Calls that are recorded together, in the surrounding transaction if there is one."""

    def __init__(self, around: Outbox | None, what: str = "the batch") -> None:
        super().__init__(self._no_connection)
        self._what = what
        self._around = around
        #: ``None`` as soon as they are being sent.
        self._calls: list[tuple[OutgoingCall, AsyncResult[Any]]] | None = []
        #: Calls that have no row, because the guard is off.
        self._plain: list[tuple[QueueLog, UnrecordedCall]] = []
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
        if self.add_call(sending, result):
            return result
        # A thread found the block before its end, and called after it.
        late = _Batch(None)
        late.add_call(sending, result)
        try:
            late.send()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return result

    def add_call(self, sending: OutgoingCall, result: AsyncResult[Any]) -> bool:
        """Add a call, unless they are being sent; return whether it was added."""
        with self._lock:
            if self._calls is None:
                return False
            sending.box = self
            self._calls.append((sending, result))
            return True

    def send_later(self, queue_log: QueueLog, call: UnrecordedCall) -> None:
        with self._lock:
            if self._calls is not None:
                self._plain.append((queue_log, call))
                return
        call.send()

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

    async def send_off_the_loop(self) -> None:
        """Do as :meth:`send` for a coroutine."""
        calls = [call.task for _, call in self._plain] + [call.task for call, _ in self._calls or ()]
        if not calls:
            self.send()
        elif self._around is not None:
            await self._around.awaited(self.send)
        else:
            await off_the_loop(calls[0].queue_log, self.send)

    def send(self) -> None:
        """Record and publish, some hundreds at a time.

        Raises:
            ExceptionGroup: The errors of single calls.
            StoreUnavailableError: The store gave no answer.
        """
        with self._lock:
            every, self._calls = self._calls or [], None
        for queue_log, call in self._plain:
            outer = self._around_of(queue_log)
            if outer is None:
                with within(None):
                    call.send()
            else:
                outer.send_later(queue_log, call)
        if self._around is not None and self._around.defer(every):
            return
        refused: list[Exception] = []
        sent = 0
        for queue_log, group in groupby(every, lambda call: call[0].task.queue_log):
            calls = list(group)
            takes = self._around_of(queue_log)
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
            raise ExceptionGroup(f"{len(refused)} of {len(every)} calls of {self._what} were not sent", refused)

    def _around_of(self, queue_log: QueueLog) -> Outbox | None:
        """Return the outbox around the batch that takes a queue log's calls, if there is one."""
        return outbox_that_takes(queue_log, self._around)

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
