"""The rows of ticks in the queue log: a beat claims a tick, sends its message, and ends the row.

A tick's row is ``processing`` while a beat sends it, with a lease. If that beat dies, or the broker is away, the lease runs out and any
beat of the app sends the message from the row, under the same Celery id.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from celery.utils import uuid

from celery_idempotent.beat.due import CalendarTick, Last, Tick
from celery_idempotent.core.records import Claim, Claimed, MessageKey, NewMessage, Row, Status
from celery_idempotent.core.storable import LONGEST, is_text
from celery_idempotent.core.store import BATCH
from celery_idempotent.errors import StoreError, StoreUnavailableError
from celery_idempotent.message.serialization import (
    UndecodableError,
    decode_message,
    decode_result,
    dumped,
    encode_message,
    encode_result,
    serializer_of,
)

if TYPE_CHECKING:
    from celery_idempotent.core.store import Store
    from celery_idempotent.queue_log import QueueLog

__all__ = ["TICKS", "Lapsed", "SentBefore", "TakenTick", "TickCall", "TickLog"]

logger = logging.getLogger("celery_idempotent")

#: The task name of all ticks' rows. No task has it, so workers leave the rows alone.
TICKS = "celery.beat"

#: The option in a row's message that holds what the tick's call has besides arguments and options.
_ABOUT = "idempotent_tick"

#: How often a claim starts over because the row changed meanwhile.
_ROUNDS = 20

#: Characters of an entry's name that stay readable in the id of a long one.
_READABLE = 150


@dataclass(frozen=True, slots=True)
class TickCall:
    """The call that a tick makes.

    Attributes:
        entry: The entry's name.
        task: The task's name.
        args, kwargs: Its arguments.
        options: Its options of ``apply_async``.
    """

    entry: str
    task: str
    args: list[Any]
    kwargs: dict[str, Any]
    options: dict[str, Any]


@dataclass(slots=True)
class TakenTick:
    """A tick that this beat sends.

    Attributes:
        claim: The claim of its row.
        task_id: The Celery id of its message, which is the same for each beat that sends it.
        call: The call to make.
        at: Its due time as text.
        keep: Seconds for which it is remembered after it was sent; ``None`` for as long as the log keeps rows.
        again: Whether another beat may have sent it before.
        taken: When it was claimed, by this process's monotonic clock.
        sent: When its message was published, by that clock; ``None`` before.
    """

    claim: Claim
    task_id: str
    call: TickCall
    at: str
    keep: float | None
    again: bool = False
    taken: float = field(default_factory=lambda: time.monotonic())  # noqa: PLW0108 - looked up late, for tests
    sent: float | None = None


@dataclass(frozen=True, slots=True)
class SentBefore:
    """The tick was sent before, or another beat is sending it.

    Attributes:
        row: The row of that tick.
        new_in: Seconds after which it is another tick, if that is soon: the message before took long to publish.
    """

    row: Row
    new_in: float | None = None


@dataclass(frozen=True, slots=True)
class Lapsed:
    """A beat took this tick, or the one before, and has not ended it within its lease: send that first."""

    row: Row


class TickLog:
    """The ticks of one app.

    Args:
        queue_log: The app's queue log.
        lease: Seconds after which another beat sends a tick that was taken and not ended; > 0.
    """

    def __init__(self, queue_log: QueueLog, *, lease: float) -> None:
        self._queue_log = queue_log
        self._lease = lease
        self._worker = f"{socket.gethostname()}:{os.getpid()}"[-LONGEST:]
        # Apps that share a log may have entries of one name, such as Celery's own `celery.backend_cleanup`.
        self._prefix = f"beat:{queue_log.app.main}:" if queue_log.app.main else "beat:"

    @property
    def _store(self) -> Store:
        return self._queue_log.store

    def take(self, tick: Tick, call: TickCall) -> TakenTick | SentBefore | Lapsed:
        """Take a tick, if no beat has.

        Args:
            tick: The tick.
            call: The call that it makes; kept in the row until it was sent.

        Raises:
            StoreError: The store did not answer, or its schema has another version. Nothing is decided.

        Atomicity: of N concurrent beats one takes it.
        """
        task_id = call.options.get("task_id") or uuid()
        key = MessageKey(self._id(tick), TICKS)
        message = NewMessage(key=key, task_id=task_id, message=self._encoded(tick, call))
        for _ in range(_ROUNDS):
            answer = self._store.claim(message, worker=self._worker, lease=self._lease, grace=0.0)
            if isinstance(answer, Claimed):
                return TakenTick(answer.claim, task_id, call, tick.at, tick.keep)
            row = answer.row
            if row.status is not Status.DONE:
                return Lapsed(row) if row.lease_left <= 0 else self._counted(row)
            last = self._last(row)
            if not tick.is_new(last):
                new_in = tick.new_in(last)
                return self._counted(row) if new_in is None else SentBefore(row, new_in)
            self._store.forget(row)  # if another beat was first, the next round finds what it made
        raise StoreUnavailableError(f"{key} could not be taken: its row kept changing")

    def _counted(self, row: Row) -> SentBefore:
        try:
            self._store.count_duplicate(row.key)
        except StoreError as error:
            logger.warning("a duplicate of %s was not counted: %s", row.key, error)
        return SentBefore(row)

    def lapsed(self) -> Iterator[Row]:
        """Yield the rows of ticks that were taken and not ended within their lease.

        Raises:
            StoreError: The store did not answer, or its schema has another version.
        """
        seen = set[MessageKey]()
        while True:
            # Read past those that another app has, and that could not be sent.
            limit = BATCH + len(seen)
            rows = self._store.lapsed(again_after=0.0, limit=limit, tasks=[TICKS])
            fresh = [row for row in rows if row.key not in seen]
            seen.update(row.key for row in fresh)
            yield from (row for row in fresh if row.key.message_id.startswith(self._prefix))
            if not fresh or len(rows) < limit:
                return

    def take_over(self, row: Row) -> TakenTick | None:
        """Take a tick from a beat that has not ended it; ``None`` if another beat was first, or it cannot be sent.

        Raises:
            StoreError: The store did not answer, or its schema has another version.
        """
        whole = row if row.message is not None else self._store.find(row.key)
        try:
            call, about = self._decoded(None if whole is None else whole.message)
        except UndecodableError as error:
            if self._store.abandon(row, error=f"not sent: {error}"):
                logger.error("%s cannot be sent: %s", row.key, error)
            return None
        if self._missed(row, about):
            if self._store.abandon(row, error="not sent within beat_cron_starting_deadline"):
                logger.warning("%s is not sent: it is older than beat_cron_starting_deadline", row.key)
            return None
        taken = self._store.take_over(row, task_id=row.task_id, worker=self._worker, lease=self._lease, attempt=0)
        if taken is None:
            return None
        return TakenTick(taken.claim, row.task_id, call, about["at"], about["keep"], again=True)

    def _missed(self, row: Row, about: Mapping[str, Any]) -> bool:
        deadline = self._queue_log.app.conf.beat_cron_starting_deadline
        age = (row.read_at - row.created_timestamp).total_seconds()
        return bool(about.get("calendar")) and deadline is not None and age > deadline

    def end(self, taken: TakenTick) -> None:
        """Note that a tick was sent.

        Raises:
            StoreError: The store did not answer. Repeat it, or another beat sends the message again.
        """
        result = encode_result(self._queue_log.app, taken.at)
        if not self._store.complete(taken.claim, result=result, unique_for=_kept(taken)):
            logger.warning(
                "%s may have been sent twice: sending it took longer than its lease, and another beat took it over",
                taken.claim.key,
            )

    def fail(self, taken: TakenTick, error: BaseException) -> None:
        """Note that a tick's message cannot be sent, whoever tries.

        Raises:
            StoreError: The store did not answer. Another beat tries once more.
        """
        self._store.fail(taken.claim, error=f"{type(error).__name__}: {error}", unique_for=_kept(taken))

    def give_back(self, taken: TakenTick) -> None:
        """Let any beat send a tick that the broker did not take.

        Raises:
            StoreError: The store did not answer. Its lease runs out by itself.
        """
        self._store.expire(taken.claim)

    # -- what a row has ------------------------------------------------------------------------------------------------

    def _id(self, tick: Tick) -> str:
        given = self._prefix + tick.name
        if is_text(given):
            return given
        digest = hashlib.sha256(given.encode("utf-8", "backslashreplace")).hexdigest()[:32]
        # Only the beginning tells whose tick it is; an app's name may be long too.
        readable = ascii(tick.entry)[1:-1][:_READABLE].replace("\0", "")
        return f"{self._prefix}{readable}:{digest}"

    def _encoded(self, tick: Tick, call: TickCall) -> bytes | None:
        app = self._queue_log.app
        task = app.tasks.get(call.task)
        about = {
            "entry": call.entry,
            "task": call.task,
            "at": tick.at,
            "keep": tick.keep,
            "calendar": isinstance(tick, CalendarTick),
        }
        try:
            args, kwargs = (
                (call.args, call.kwargs) if task is None else dumped(task, call.args, call.kwargs, call.options)
            )
            serializer = (
                call.options.get("serializer") or app.conf.task_serializer
                if task is None
                else serializer_of(task, call.options)
            )
            return encode_message(args, kwargs, {**call.options, _ABOUT: about}, serializer=serializer, now=app.now())
        except Exception as error:  # noqa: BLE001 - sending it raises the same, and says so in beat's log
            logger.warning(
                "the message of beat's entry %r cannot be kept, so only this beat can send it: %s", call.entry, error
            )
            return None

    def _decoded(self, message: bytes | None) -> tuple[TickCall, Mapping[str, Any]]:
        args, kwargs, options = decode_message(self._queue_log.app, message)
        about = options.pop(_ABOUT, None)
        if not isinstance(about, Mapping) or not {"entry", "task", "at", "keep"} <= set(about):
            raise UndecodableError("the row is not a tick's")
        return TickCall(about["entry"], about["task"], args, kwargs, options), about

    def _last(self, row: Row) -> Last:
        try:
            at = None if row.result is None else decode_result(self._queue_log.app, row.result)
        except UndecodableError:
            at = None
        sent = row.processed_timestamp or row.created_timestamp
        return Last(sent=sent, now=row.read_at, at=at if isinstance(at, str) else None)


def _kept(taken: TakenTick) -> float | None:
    """Return for how long a tick's id stays taken: what is left, since its message was published a moment ago."""
    if taken.keep is None or taken.sent is None:
        return taken.keep
    return max(taken.keep - (time.monotonic() - taken.sent), 0.0)
