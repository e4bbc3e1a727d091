"""The base class of all outboxes, and the blocks of code whose calls they take.

The row in ``queue_log`` is the outbox, since it holds the message. After a rollback there is no row. After a commit, the committing process
publishes the message at once. If it dies before that, the relay publishes (see :mod:`celery_idempotent.producer.relay`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import CO_GENERATOR
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from celery_idempotent.core.begin import begin
from celery_idempotent.core.transactions import refuse_autocommit, transactional
from celery_idempotent.errors import ConfigurationError, StoreError
from celery_idempotent.producer.publisher import Publisher

if TYPE_CHECKING:
    from types import FrameType

    from celery.result import AsyncResult
    from sqlalchemy import Connection

    from celery_idempotent.core.records import Duplicate, Inserted, MessageKey
    from celery_idempotent.core.store import Store
    from celery_idempotent.producer.guarded import Guarded, UnrecordedCall
    from celery_idempotent.producer.publisher import Outgoing
    from celery_idempotent.queue_log import QueueLog

__all__ = [
    "OUTBOX",
    "PUBLISH_WITHIN",
    "Outbox",
    "OutgoingCall",
    "block_outbox",
    "innermost_outbox",
    "within",
]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")

#: Seconds after recording in which only the recording process publishes an outbox row. If the transaction takes longer, a relay may
#: publish the row too; the claim absorbs the second copy.
PUBLISH_WITHIN = 5.0

#: The connection's execution option that holds the outbox to publish after its commit.
OUTBOX = "celery_idempotent_outbox"

#: Packages whose threads run a function in a copy of the context, which ends with the function.
_THREAD_POOLS = ("anyio", "asyncio", "concurrent", "threading")

#: Modules whose frames are between a block and the code that enters it.
_OURS = (__name__, "celery_idempotent.producer.batch", "celery_idempotent.producer.outbox", "contextlib")


@dataclass(slots=True, eq=False)
class _Block:
    """A ``with outbox(...)``, or an atomic body.

    Attributes:
        box: The outbox that takes its calls; ``None`` if they are sent at once.
        around: The enclosing block.
        left: Whether it has ended. An asyncio task or a thread that started in it may outlive it.
    """

    box: Outbox | None
    around: _Block | None
    left: bool = False


_current: ContextVar[_Block | None] = ContextVar("celery_idempotent_outbox", default=None)


def _innermost() -> _Block | None:
    """Return the innermost block of the current context that has not ended."""
    block = _current.get()
    while block is not None and block.left:
        block = block.around
    return block


def innermost_outbox() -> Outbox | None:
    """Return the outbox of the innermost ``with outbox(...)`` or atomic body that has not ended."""
    block = _innermost()
    return None if block is None else block.box


def block_outbox(queue_log: QueueLog) -> Outbox | None:
    """Return that outbox if it takes calls of this queue log."""
    box = innermost_outbox()
    return box if box is not None and box.takes(queue_log) else None


@contextmanager
def within(box: Outbox | None) -> Iterator[None]:
    """Let an outbox take the calls of the block; ``None`` sends them at once.

    Raises:
        ConfigurationError: The block's code runs in another context than its beginning, so its calls were not seen to be in it.
    """
    _refuse_fleeting_context()
    around = _innermost()
    block = _Block(box, around)
    _current.set(block)
    try:
        yield
    finally:
        block.left = True
        if _current.get() is block:
            _current.set(around)
        elif not _is_around(block, _current.get()) and not isinstance(sys.exception(), GeneratorExit):
            raise ConfigurationError(
                "with outbox(...) was left in another context than it was entered in, so calls in between were sent at once: "
                "enter and leave it in one function, or in one coroutine"
            )


def _is_around(block: _Block, inner: _Block | None) -> bool:
    while inner is not None and inner is not block:
        inner = inner.around
    return inner is block


def _refuse_fleeting_context() -> None:
    """Refuse a block in a generator that a thread pool runs up to its ``yield``.

    FastAPI enters a dependency without ``async`` like this, in a copy of the request's context that is gone when the endpoint is called.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, for code that inspects its callers
    in_generator, module = False, ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module not in _OURS:
            if not frame.f_code.co_flags & CO_GENERATOR:
                break
            in_generator = True
        frame = frame.f_back
    if in_generator and frame is not None and module.partition(".")[0] in _THREAD_POOLS:
        raise ConfigurationError(
            "with outbox(...) is in a generator that a thread pool enters, as FastAPI does with a dependency without async, so the "
            "caller would send its calls at once: write `async def`, or put the block into the caller"
        )


class OutgoingCall(Protocol):
    """A call to record and publish, as an outbox needs it."""

    #: The outbox that records it.
    box: Outbox | None

    @property
    def task(self) -> Guarded:
        """The task that is called."""

    def record_in(self, box: Outbox) -> AsyncResult[Any]:
        """Record the call in an outbox's transaction; return its result."""

    def promised(self) -> AsyncResult[Any]:
        """Return the result of a call that is recorded later. Its id changes if the call turns out to be a duplicate."""

    def record_together(self, calls: Sequence[Any]) -> list[Inserted | Duplicate]:
        """Record this and other calls of the same app, in few statements."""

    def resolve(self, answer: Inserted | Duplicate) -> AsyncResult[Any]:
        """Act on the store's answer, inserted or duplicate; return the call's result."""

    def taken_back(self) -> bool:
        """Withdraw the call if it was recorded and not published; return whether that is certain."""


class Outbox:
    """The messages of the current transaction of a session or connection.

    Args:
        connect: Returns the transaction's connection.
    """

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._connection: Connection | None = None
        self._messages: list[Outgoing] = []
        self._duplicates: list[tuple[QueueLog, MessageKey]] = []
        #: Calls that have no row, because the guard is off.
        self._unrecorded: list[UnrecordedCall] = []

    # -- for the producer ----------------------------------------------------------------------------------------------

    def take(self, sending: OutgoingCall) -> AsyncResult[Any]:
        """Record a call; return its result."""
        return sending.record_in(self.that_commits())

    async def awaited(self, work: Callable[[], T]) -> T:
        """Record here for a coroutine: in its own thread, because other threads may not use its transaction."""
        return work()

    def defer(self, calls: Sequence[tuple[OutgoingCall, AsyncResult[Any]]]) -> bool:  # noqa: ARG002 - for asynchronous sessions
        """Keep promised calls until the commit, if they cannot be recorded now; return whether they were kept."""
        return False

    def takes(self, queue_log: QueueLog) -> bool:  # noqa: ARG002 - for atomic bodies
        """Return whether calls of this queue log are recorded here; otherwise they are sent at once."""
        return True

    @property
    def joins(self) -> bool:
        """Whether the rows are part of a user's transaction."""
        return True

    def store(self, queue_log: QueueLog) -> Store:
        """Return a queue log's store whose verbs run in the transaction."""
        store = transactional(queue_log.store, "outbox(session)")
        return store.within(self._joined())

    def _joined(self) -> Connection:
        """Return the transaction's connection, with the transaction begun."""
        connection = self._connect()
        if connection is not self._connection:
            refuse_autocommit(
                connection,
                "outbox() needs a transaction, but this session is in autocommit: give it another isolation level",
            )
            self._connection = connection
        begin(connection)
        return connection

    def add(self, message: Outgoing) -> None:
        """Publish a message after the commit."""
        self._messages.append(message)

    def send_later(self, queue_log: QueueLog, call: UnrecordedCall) -> None:  # noqa: ARG002 - for a batch
        """Send a call without a row after the commit. A rollback drops it, and so does the death of this process."""
        self.that_commits().keep(call)

    def keep(self, call: UnrecordedCall) -> None:
        """Keep a call without a row until this outbox's own transaction has committed."""
        self._joined()
        self._unrecorded.append(call)

    def count(self, queue_log: QueueLog, key: MessageKey) -> None:
        """Count a duplicate after the commit; counting it now would lock its row until then."""
        self._duplicates.append((queue_log, key))

    # -- at the end of the transaction ---------------------------------------------------------------------------------

    def publish(self) -> None:
        """Publish the messages, after the commit."""
        messages, duplicates, unrecorded = self._messages, self._duplicates, self._unrecorded
        self.discard()
        if messages or duplicates or unrecorded:
            self._publish(messages, duplicates, unrecorded)

    def _publish(
        self,
        messages: list[Outgoing],
        duplicates: list[tuple[QueueLog, MessageKey]],
        unrecorded: list[UnrecordedCall],
    ) -> None:
        with within(None):  # an eager body runs after the block, not in it
            for queue_log, some in groupby(messages, lambda message: message.task.queue_log):
                ours = self._still_there(queue_log, list(some))
                Publisher.of(queue_log).publish(ours)
                for message in ours:
                    if message.emit is not None:
                        message.emit()
            for queue_log, key in duplicates:
                Publisher.of(queue_log).count_duplicate(key)
            for call in unrecorded:
                try:
                    call.send()
                except Exception:  # the caller has committed, and must not take that for undone
                    logger.exception("%s was not sent after its commit; it has no row, so nothing will send it", call)

    def discard(self) -> None:
        """Drop the messages, after a rollback. If the commit's outcome is unknown, drop them too: the relay publishes them."""
        self._messages, self._duplicates, self._unrecorded = [], [], []

    def that_commits(self) -> Outbox:
        """Return the outbox that publishes after the commit: the atomic body's if the connection is its own, otherwise this one."""
        found: Outbox | None = self._connect().get_execution_options().get(OUTBOX)
        return found or self

    def _still_there(self, queue_log: QueueLog, messages: list[Outgoing]) -> list[Outgoing]:
        """Return the messages whose rows were committed.

        A successful commit may not have committed everything. A savepoint may have been rolled back, also by textual SQL. PostgreSQL
        rolls back without an error after a statement that failed, even if only the driver saw the failure. MySQL continues in another
        transaction after a deadlock. So read the rows instead of tracking all of this.
        """
        if not messages:
            return messages
        try:
            task_ids = transactional(queue_log.store).recorded([message.key for message in messages])
        except StoreError as error:
            logger.warning(
                "%d messages are left to the relay, since the store does not answer: %s", len(messages), error
            )
            return []
        # After a rollback, another process may have recorded the same id.
        return [message for message in messages if task_ids.get(message.key) == message.header.task_id]
