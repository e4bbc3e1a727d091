"""The outbox that takes the calls of here and now, and what each kind of it has in common.

The row in ``queue_log`` is the outbox: it holds the message. Rolled back, it never was. Committed, it is published right then by
whoever committed; should that one not come to it, the relay does (see :mod:`celery_idempotent.producer.relay`).
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
from typing import TYPE_CHECKING, Any, Protocol

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
    from celery_idempotent.core.store.transactional import Surrounding
    from celery_idempotent.producer.guarded import Guarded
    from celery_idempotent.producer.publisher import Outgoing
    from celery_idempotent.queue_log import QueueLog

__all__ = [
    "OUTBOX",
    "PUBLISH_WITHIN",
    "Outbox",
    "OutgoingCall",
    "current_outbox",
    "innermost",
    "surrounding_outbox",
    "within",
]

logger = logging.getLogger("celery_idempotent")

#: Seconds for which a row of the outbox is its recorder's to publish, from when it was recorded. After a transaction that took longer a
#: relay may publish it too: a copy too many, which the claim absorbs.
PUBLISH_WITHIN = 5.0

#: The execution option by which a connection knows the outbox that is published by whoever commits it.
OUTBOX = "celery_idempotent_outbox"

#: Whose threads run a function in a copy of the context, which ends with it.
_THREAD_POOLS = ("anyio", "asyncio", "concurrent", "threading")

#: The modules between a block and who enters it.
_OURS = (__name__, "celery_idempotent.producer.batch", "celery_idempotent.producer.outbox", "contextlib")


@dataclass(slots=True, eq=False)
class _Block:
    """A ``with outbox(...)``, or an atomic body.

    Attributes:
        box: What takes its calls; ``None`` if they are sent at once.
        around: The block that it is in.
        left: Whether it has ended. A task of an event loop, or a thread, that was begun in it may outlive it.
    """

    box: Outbox | None
    around: _Block | None
    left: bool = False


_current: ContextVar[_Block | None] = ContextVar("celery_idempotent_outbox", default=None)


def innermost() -> _Block | None:
    """Return the innermost block, here and now, that has not ended."""
    block = _current.get()
    while block is not None and block.left:
        block = block.around
    return block


def current_outbox(queue_log: QueueLog) -> Outbox | None:
    """Return what takes a call that is made here and now, in this thread or task of an event loop.

    That is the innermost ``with outbox(...)`` or atomic body, as far as that is one of the same queue log and not over; else the
    transaction of a framework.
    """
    block = innermost()
    box = None if block is None else block.box
    return box if box is not None and box.takes(queue_log) else surrounding_outbox(queue_log)


@contextmanager
def within(box: Outbox | None) -> Iterator[None]:
    """Have an outbox take the calls of the block; or none.

    Raises:
        ConfigurationError: The block's code runs in other contexts than its beginning, and is not seen to be in it.
    """
    _refuse_fleeting_context()
    around = innermost()
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
                "with outbox(...) was left in another context than it was entered in, so the calls in between were not seen to be in "
                "it, and were sent at once: enter and leave it in one function, or in one coroutine"
            )


def _is_around(block: _Block, inner: _Block | None) -> bool:
    while inner is not None and inner is not block:
        inner = inner.around
    return inner is block


def _refuse_fleeting_context() -> None:
    """Refuse a block in a generator that a pool of threads runs as far as to the ``yield``.

    FastAPI enters a dependency without ``async`` so: in a copy of the request's context, which is gone when the endpoint is called.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, if only for what looks at callers
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
            "with outbox(...) is in a generator that a pool of threads enters, as FastAPI does with a dependency without async: its "
            "caller would not be in the block, and would send its calls at once; write `async def`, or put the block into the caller"
        )


class OutgoingCall(Protocol):
    """A call on its way out, as an outbox takes it."""

    #: What it is recorded in.
    box: Outbox | None

    @property
    def task(self) -> Guarded:
        """The task that is called."""

    def record_in(self, box: Outbox) -> AsyncResult[Any]:
        """Record it in an outbox's transaction; its result."""

    def promised(self) -> AsyncResult[Any]:
        """Its result, if it is recorded later: that may be another's then."""

    def record_together(self, calls: Sequence[Any]) -> list[Inserted | Duplicate]:
        """Record it and others of the same app, in as few statements as it takes."""

    def resolve(self, answer: Inserted | Duplicate) -> AsyncResult[Any]:
        """Return what it comes to, as it was recorded or found; its result."""

    def taken_back(self) -> bool:
        """Take it back if it was recorded, and not published; whether that is certain."""


class Outbox:
    """The messages of one transaction after another.

    Args:
        connect: The connection of the transaction.
    """

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._connection: Connection | None = None
        self._messages: list[Outgoing] = []
        self._duplicates: list[tuple[QueueLog, MessageKey]] = []

    # -- for the producer ----------------------------------------------------------------------------------------------

    def take(self, sending: OutgoingCall) -> AsyncResult[Any]:
        """Record a call; its result."""
        return sending.record_in(self.that_commits())

    def takes(self, queue_log: QueueLog) -> bool:  # noqa: ARG002 - for atomic bodies to say
        """Return whether a call of this queue log's is to be recorded here, or sent at once."""
        return True

    @property
    def joins(self) -> bool:
        """Whether what is recorded is part of a transaction of somebody's."""
        return True

    def store(self, queue_log: QueueLog) -> Store:
        """Return a queue log's store, with its verbs in the transaction."""
        store = transactional(queue_log.store, "outbox(session)")
        connection = self._connect()
        if connection is not self._connection:
            refuse_autocommit(
                connection,
                "outbox() needs a transaction, and this session is in autocommit; give it another isolation level",
            )
            self._connection = connection
        begin(connection)
        return store.within(connection)

    def add(self, message: Outgoing) -> None:
        """Publish a message when the transaction has committed."""
        self._messages.append(message)

    def count(self, queue_log: QueueLog, key: MessageKey) -> None:
        """Count a duplicate when the transaction has committed: its row is not to be locked until then."""
        self._duplicates.append((queue_log, key))

    # -- for whoever ends the transaction ------------------------------------------------------------------------------

    def publish(self) -> None:
        """Publish what is there, after the commit."""
        messages, duplicates = self._messages, self._duplicates
        self.discard()
        if not (messages or duplicates):
            return
        with within(None):  # what is run eagerly is behind it, not in it
            for queue_log, some in groupby(messages, lambda message: message.task.queue_log):
                ours = self._still_there(queue_log, list(some))
                Publisher.of(queue_log).publish(ours)
                for message in ours:
                    if message.emit is not None:
                        message.emit()
            for queue_log, key in duplicates:
                Publisher.of(queue_log).count_duplicate(key)

    def discard(self) -> None:
        """Drop what is there after a rollback, or when nobody can tell: the relay will then publish it."""
        self._messages, self._duplicates = [], []

    def that_commits(self) -> Outbox:
        """Return this outbox, or the atomic body's whose connection it is on."""
        found: Outbox | None = self._connect().get_execution_options().get(OUTBOX)
        return found or self

    def _still_there(self, queue_log: QueueLog, messages: list[Outgoing]) -> list[Outgoing]:
        """Those whose rows are there.

        A commit that succeeds has not committed everything: a savepoint may have been rolled back, in words too; PostgreSQL answers by a
        rollback, without an error, after an error that was caught, even one that only the driver heard of; after a deadlock MySQL
        goes on in another transaction. So the rows are read, rather than all of that followed.
        """
        if not messages:
            return messages
        try:
            task_ids = transactional(queue_log.store).recorded([message.key for message in messages])
        except StoreError as error:
            logger.warning("%d messages are left to the relay, the store gives no answer: %s", len(messages), error)
            return []
        # Behind what was rolled back somebody else may have recorded the id.
        return [message for message in messages if task_ids.get(message.key) == message.header.task_id]


class _SurroundingOutbox(Outbox):
    """The calls that are published by one hook of a framework's transaction."""

    def __init__(self, surrounding: Surrounding) -> None:
        super().__init__(surrounding.connect)
        self._surrounding: Surrounding | None = surrounding

    def add(self, message: Outgoing) -> None:
        self._await_commit()
        super().add(message)

    def count(self, queue_log: QueueLog, key: MessageKey) -> None:
        self._await_commit()
        super().count(queue_log, key)

    def _await_commit(self) -> None:
        if self._surrounding is not None:
            self._surrounding.after_commit(self.publish)
            self._surrounding = None


def surrounding_outbox(queue_log: QueueLog) -> Outbox | None:
    """Return what takes a call in the transaction of a framework, where the store is in its database."""
    find = getattr(queue_log.store, "surrounding", None)
    surrounding: Surrounding | None = find() if find is not None and queue_log.settings.django_outbox else None
    if surrounding is None:
        return None
    # Those that follow each other are published together.
    last = getattr(surrounding.last_hook(), "__self__", None)
    return last if isinstance(last, _SurroundingOutbox) else _SurroundingOutbox(surrounding)
