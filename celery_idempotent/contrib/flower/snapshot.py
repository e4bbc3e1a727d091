"""The data of Flower's page and series: a glance, read from indexes, and counts, read now and then.

A glance is fast however long the log is. Counting, and finding failed messages, reads the whole log. So it is done in the background, one
at a time, and so rarely that it takes at most a twentieth of the time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from celery_idempotent.contrib.flower.async_store import Questions
from celery_idempotent.contrib.flower.event_log import EventLog
from celery_idempotent.core.records import (
    FORGOTTEN,
    LogHealth,
    MessageKey,
    ProcessedStatus,
    Row,
    RowFilter,
    Status,
    TaskCount,
)
from celery_idempotent.errors import IdempotentError, StoreError, StoreUnavailableError
from celery_idempotent.queue_log import QueueLog

if TYPE_CHECKING:
    from celery import Celery

    from celery_idempotent.core.store import Store

__all__ = ["LISTED", "Counted", "Glance", "Snapshot", "legible"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")

#: How many rows of a kind are read at most.
LISTED = 100

#: Seconds for which a glance is valid, and within which it must be answered.
_GLANCE_GOOD, _GLANCE_WITHIN = 2.0, 5.0

#: Counts are valid for at least this many seconds, and for this many times the time that they took. A page waits this long for new ones.
_COUNT_GOOD, _COUNT_SHARE, _COUNT_PATIENCE = 5.0, 20.0, 1.0

#: Columns of a row, besides its key, whose text comes from a message or a worker.
_TEXTS = ("task_id", "queue", "worker", "error", "ran_task_id")

#: How many searches are kept with their results.
_SEARCHES_KEPT = 16


@dataclass(frozen=True, slots=True)
class Glance:
    """The state of the queue log, from indexes. At most :data:`LISTED` rows of each kind.

    Attributes:
        health: See :class:`~celery_idempotent.core.records.LogHealth`.
        running: Claims, the first recorded first.
        lapsed: Claims whose lease ran out and whose message was not published again since.
        unsent: Messages that were never handed to the broker, the oldest first.
        waiting: Due messages that the broker has, the first published first.
        latest: Messages that run or that ended last, in no order.
    """

    health: LogHealth
    running: tuple[Row, ...] = ()
    lapsed: tuple[Row, ...] = ()
    unsent: tuple[Row, ...] = ()
    waiting: tuple[Row, ...] = ()
    latest: tuple[Row, ...] = ()

    @property
    def read_at(self) -> datetime:
        """The store's clock."""
        return self.health.read_at


@dataclass(frozen=True, slots=True)
class Counted:
    """The counts of the whole log.

    Attributes:
        counts: Rows by task and status.
        failed: The failed messages that were recorded last; at most :data:`LISTED`.
        at: When they were counted, by :func:`time.monotonic`.
        duplicates_before: Skipped copies in the count before, and its time; ``None`` for the first count.
    """

    counts: tuple[TaskCount, ...]
    failed: tuple[Row, ...]
    at: float = field(default_factory=time.monotonic)
    duplicates_before: tuple[int, float] | None = None

    @property
    def duplicates(self) -> int:
        """The number of skipped copies of all messages in the log."""
        return sum(count.duplicates for count in self.counts)

    def number(self, status: Status, processed_status: ProcessedStatus | None = None) -> int:
        """Return the number of messages in a status and, if given, with an outcome."""
        return sum(
            count.rows
            for count in self.counts
            if count.status is status and processed_status in (None, count.processed_status)
        )


class _Kept(Generic[T]):
    """The last answer to a question that many ask. It is asked again only if the answer is too old, and once at a time."""

    def __init__(self, ask: Callable[[], Any], good: Callable[[float], float]) -> None:
        self._ask, self._good = ask, good
        self._asking: asyncio.Task[None] | None = None
        self._since: float | None = None
        self.answer: T | None = None
        self.error: IdempotentError | None = None
        self.took = 0.0
        self.began: float | None = None

    async def look(self, *, patience: float) -> None:
        """Ask if that is due, and wait up to ``patience`` seconds for an answer that is on its way."""
        if self._asking is None and (self._since is None or time.monotonic() - self._since > self._good(self.took)):
            self.began = time.monotonic()
            self._asking = asyncio.ensure_future(self._look())
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=patience)

    def forget(self) -> None:
        """Forget the answer, so that it is asked next time."""
        self._since = None

    async def _look(self) -> None:
        assert self.began is not None
        try:
            self.answer, self.error = await self._ask(), None
        except IdempotentError as error:
            self.error = error
        except Exception as error:
            logger.exception("Flower's page cannot read the queue log")
            self.error = StoreError(f"{type(error).__name__}: {error}")
        finally:
            self._since = time.monotonic()
            self.took, self.began, self._asking = self._since - self.began, None, None


class Snapshot:
    """The figures of an app's queue log, for one event loop.

    Args:
        app: The app.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        # Each kind of question has its own threads, so that long searches do not delay glances.
        glances, counts, self._questions, self._searches = Questions(2), Questions(1), Questions(), Questions(2)
        self._is_there = False
        self._glance: _Kept[Glance] = _Kept(
            lambda: glances.ask(self._read, within=_GLANCE_WITHIN), lambda _: _GLANCE_GOOD
        )
        self._counted: _Kept[Counted] = _Kept(lambda: counts.ask(self._count, within=None), _good_for)
        self._found: OrderedDict[str, _Kept[list[Row]]] = OrderedDict()
        self.event_log = EventLog()

    @property
    def queue_log(self) -> QueueLog:
        """The app's queue log."""
        return QueueLog.of(self._app)

    async def ask(self, question: Callable[[], T], *, within: float) -> T:
        """See :meth:`Questions.ask`."""
        return await self._questions.ask(question, within=within)

    async def search(self, pattern: str, *, limit: int, patience: float) -> list[Row]:
        """Return the rows whose message ids match a pattern, the last recorded first.

        A search reads the whole log. So, like a count, it is made once for all who search for the same, and its answer is kept as long.

        Args:
            pattern: The pattern.
            limit: How many rows to return at most.
            patience: Seconds to wait for an answer.

        Raises:
            StoreUnavailableError: There is no answer yet. The search continues, unless too many others are under way.
            IdempotentError: The store's error.
        """

        def search() -> list[Row]:
            return [] if self.store() is None else legible(self.queue_log.rows(message_id=pattern, limit=limit))

        found = self._found.pop(pattern, None) or _Kept(lambda: self._searches.ask(search, within=None), _good_for)
        self._found[pattern] = found
        while len(self._found) > _SEARCHES_KEPT:
            self._found.popitem(last=False)
        await found.look(patience=patience)
        if found.error is not None:
            raise found.error
        if found.answer is None:
            raise StoreUnavailableError(
                f"the search has taken {patience:g} s so far and continues: look again in a moment"
            )
        return found.answer

    async def look(self, *, patience: float = _GLANCE_WITHIN + 1.0) -> None:
        """Update the figures that are too old.

        Args:
            patience: Seconds to wait for the store. If neither an answer nor a timeout has come by then, the last answer stays.
        """
        await self._glance.look(patience=patience)
        if self._glance.error is None:
            await self._counted.look(patience=_COUNT_PATIENCE)

    def changed(self, key: MessageKey) -> None:
        """Forget what was read of a message, because it has changed."""
        self._glance.forget()
        counted = self._counted.answer
        if counted is not None:
            failed = tuple(row for row in counted.failed if row.key != key)
            self._counted.answer = Counted(counted.counts, failed, counted.at, counted.duplicates_before)

    @property
    def glance(self) -> Glance | None:
        """The last glance, if the store has answered since it was last asked."""
        return None if self._glance.error is not None else self._glance.answer

    @property
    def counted(self) -> Counted | None:
        """The last counts."""
        return self._counted.answer

    @property
    def took(self) -> float:
        """Seconds that the last count took."""
        return self._counted.took

    @property
    def counting_for(self) -> float | None:
        """Seconds for which a count has been under way; ``None`` if none is."""
        return None if self._counted.began is None else time.monotonic() - self._counted.began

    @property
    def error(self) -> IdempotentError | None:
        """Why the queue log cannot be read."""
        return self._glance.error or self._counted.error

    @property
    def failed(self) -> list[Row]:
        """Failed messages, the latest first, without those that are known to have changed since."""
        rows = {row.key: row for row in (self.counted.failed if self.counted else ())}
        if self.glance is not None:
            rows.update((row.key, row) for row in (*self.glance.latest, *self.glance.waiting, *self.glance.unsent))
        failed = (row for row in rows.values() if _has_failed(row))
        return sorted(failed, key=_ended, reverse=True)[:LISTED]

    # -- in threads ------------------------------------------------------------------------------------------------------

    def store(self) -> Store | None:
        """Return the store; ``None`` until its schema exists."""
        store = self.queue_log.store
        # Do not create a schema that is created on first use.
        self._is_there = self._is_there or store.inspect()
        return store if self._is_there else None

    def _read(self) -> Glance:
        store = self.store()
        if store is None:
            return Glance(LogHealth(datetime.now(UTC)))
        return Glance(
            store.health(),
            running=tuple(legible(store.rows(RowFilter(status=Status.PROCESSING, oldest_first=True, limit=LISTED)))),
            lapsed=tuple(legible(store.lapsed(again_after=0.0, limit=LISTED))),
            unsent=tuple(legible(store.unsent(limit=LISTED))),
            waiting=tuple(legible(store.waiting(older_than=0.0, limit=10))),
            latest=tuple(legible(store.newest(limit=2 * LISTED))),
        )

    def _count(self) -> Counted:
        store, last = self.store(), self._counted.answer
        before = None if last is None else (last.duplicates, last.at)
        if store is None:
            return Counted((), (), duplicates_before=before)
        counts = tuple(store.counts())
        failed = RowFilter(status=Status.DONE, processed_status=ProcessedStatus.FAILURE, limit=LISTED)
        return Counted(counts, tuple(legible(store.rows(failed))), duplicates_before=before)


def legible(rows: Iterable[Row]) -> list[Row]:
    """Return rows that a page can show: escape lone surrogates, which Redis keeps and UTF-8 lacks."""
    return [_legible(row) for row in rows]


def _legible(row: Row) -> Row:
    texts = {name: getattr(row, name) for name in _TEXTS}
    try:
        "".join(filter(None, (*astuple(row.key), *texts.values()))).encode()
    except UnicodeEncodeError:
        escaped: dict[str, Any] = {name: None if text is None else _escaped(text) for name, text in texts.items()}
        return replace(row, key=MessageKey(*map(_escaped, astuple(row.key))), **escaped)
    return row


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _good_for(took: float) -> float:
    """Return the seconds for which an answer is valid: reading the whole log may take at most a twentieth of the time."""
    return max(_COUNT_GOOD, _COUNT_SHARE * took)


def _has_failed(row: Row) -> bool:
    failed = row.status is Status.DONE and row.processed_status is ProcessedStatus.FAILURE
    return failed and row.error != FORGOTTEN


def _ended(row: Row) -> datetime:
    return row.processed_timestamp or row.created_timestamp
