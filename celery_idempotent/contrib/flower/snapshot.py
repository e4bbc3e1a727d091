"""What Flower's page and series show of a queue log: what is read at a glance, and what is counted now and then.

At a glance is what indexes tell, however long the log is. Counting, and looking for what failed, read the whole log: they are done in the
background, once at a time, and so seldom that they take no more than a twentieth of the time.
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
from celery_idempotent.contrib.flower.event_log import Heard
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
from celery_idempotent.core.storable import is_text
from celery_idempotent.errors import IdempotentError, StoreError, StoreUnavailableError
from celery_idempotent.queue_log import QueueLog

if TYPE_CHECKING:
    from celery import Celery

    from celery_idempotent.core.store import Store

__all__ = ["LISTED", "Counted", "Figures", "Glance", "legible"]

logger = logging.getLogger("celery_idempotent")

T = TypeVar("T")

#: At most so many rows of a kind.
LISTED = 100

#: Seconds for which a glance is good; within which it must be answered; and which a page waits for it.
_GLANCE_GOOD, _GLANCE_WITHIN = 2.0, 5.0

#: Seconds for which counts are good at least, and how many times as long as they took; and which a page waits for new ones.
_COUNT_GOOD, _COUNT_SHARE, _COUNT_PATIENCE = 5.0, 20.0, 1.0

#: What of a row comes from a message, besides its key.
_TEXTS = ("task_id", "queue", "worker", "error", "ran_task_id")

#: So many searches are kept with what they found.
_SEARCHES_KEPT = 16


@dataclass(frozen=True, slots=True)
class Glance:
    """How the queue log stands, as far as indexes tell. Rows of each kind: at most :data:`LISTED`.

    Attributes:
        condition: See :class:`~celery_idempotent.core.records.LogHealth`.
        running: Claims, those recorded first coming first.
        lapsed: Those whose lease ran out and whose message nobody has published again since.
        unsent: Messages that were never handed to the broker, the oldest first.
        waiting: Messages that the broker has and that are due, those published first coming first.
        latest: What runs, and what ended last, in no order.
    """

    condition: LogHealth
    running: tuple[Row, ...] = ()
    lapsed: tuple[Row, ...] = ()
    unsent: tuple[Row, ...] = ()
    waiting: tuple[Row, ...] = ()
    latest: tuple[Row, ...] = ()

    @property
    def read_at(self) -> datetime:
        """The store's clock."""
        return self.condition.read_at


@dataclass(frozen=True, slots=True)
class Counted:
    """What a look at the whole log told.

    Attributes:
        counts: Rows by task and status.
        failed: Of the messages that failed, those recorded last; at most :data:`LISTED`.
        at: When, by :func:`time.monotonic`.
        duplicates_before: Copies that were skipped, by the count before, and when that was; ``None`` for the first.
    """

    counts: tuple[TaskCount, ...]
    failed: tuple[Row, ...]
    at: float = field(default_factory=time.monotonic)
    duplicates_before: tuple[int, float] | None = None

    @property
    def duplicates(self) -> int:
        """Copies that were skipped, of all messages in the log."""
        return sum(count.duplicates for count in self.counts)

    def number(self, status: Status, processed_status: ProcessedStatus | None = None) -> int:
        """Messages in a status; and that ended so, if that is said."""
        return sum(
            count.rows
            for count in self.counts
            if count.status is status and processed_status in (None, count.processed_status)
        )


class _Kept(Generic[T]):
    """The last answer to a question that many ask: it is passed on once at a time, and not before the answer is too old."""

    def __init__(self, ask: Callable[[], Any], good: Callable[[float], float]) -> None:
        self._ask, self._good = ask, good
        self._asking: asyncio.Task[None] | None = None
        self._since: float | None = None
        self.answer: T | None = None
        self.error: IdempotentError | None = None
        self.took = 0.0
        self.began: float | None = None

    async def look(self, *, patience: float) -> None:
        """Have it asked if that is due, and wait for an answer that is on its way for so many seconds."""
        if self._asking is None and (self._since is None or time.monotonic() - self._since > self._good(self.took)):
            self.began = time.monotonic()
            self._asking = asyncio.ensure_future(self._look())
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=patience)

    def forget(self) -> None:
        """Have it asked next time."""
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


class Figures:
    """The figures of an app's queue log. All of it is for one event loop.

    Args:
        app: The app.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        # Each kind of question has threads of its own: searches that take minutes keep nobody from telling whether the store answers.
        glances, counts, self._questions, self._searches = Questions(2), Questions(1), Questions(), Questions(2)
        self._is_there = False
        self._glance: _Kept[Glance] = _Kept(
            lambda: glances.ask(self._read, within=_GLANCE_WITHIN), lambda _: _GLANCE_GOOD
        )
        self._counted: _Kept[Counted] = _Kept(lambda: counts.ask(self._count, within=None), _good_for)
        self._found: OrderedDict[str, _Kept[list[Row]]] = OrderedDict()
        self.heard = Heard()

    @property
    def queue_log(self) -> QueueLog:
        """The app's queue log."""
        return QueueLog.of(self._app)

    async def ask(self, question: Callable[[], T], *, within: float) -> T:
        """See :meth:`Questions.ask`."""
        return await self._questions.ask(question, within=within)

    async def search(self, pattern: str, *, limit: int, patience: float) -> list[Row]:
        """Return the rows of a pattern of message ids, those recorded last coming first.

        A search reads the whole log. So it is made once for all who look for the same, as a count is, and its answer is good for as long.

        Args:
            pattern: The pattern.
            limit: At most so many rows.
            patience: Seconds for which an answer is waited for.

        Raises:
            StoreUnavailableError: There is none yet; it is being looked for, unless too many other searches are.
            IdempotentError: What the store said instead.
        """

        def search() -> list[Row]:
            store = self.store()
            if store is None or not is_text(pattern):  # nothing that could not be kept is there
                return []
            return legible(store.rows(RowFilter(message_id=pattern, limit=limit)))

        found = self._found.pop(pattern, None) or _Kept(lambda: self._searches.ask(search, within=None), _good_for)
        self._found[pattern] = found
        while len(self._found) > _SEARCHES_KEPT:
            self._found.popitem(last=False)
        await found.look(patience=patience)
        if found.error is not None:
            raise found.error
        if found.answer is None:
            raise StoreUnavailableError(
                f"the search is under way and has taken {patience:g} s so far: look again in a moment"
            )
        return found.answer

    async def look(self, *, patience: float = _GLANCE_WITHIN + 1.0) -> None:
        """See to it that the figures are as new as they are to be.

        Args:
            patience: Seconds for which a store is waited for that does not answer. Without an answer, nor the end of its time, the last
                one stays.
        """
        await self._glance.look(patience=patience)
        if self._glance.error is None:
            await self._counted.look(patience=_COUNT_PATIENCE)

    def changed(self, key: MessageKey) -> None:
        """Forget what was read of a message, which has changed since."""
        self._glance.forget()
        counted = self._counted.answer
        if counted is not None:
            failed = tuple(row for row in counted.failed if row.key != key)
            self._counted.answer = Counted(counted.counts, failed, counted.at, counted.duplicates_before)

    @property
    def glance(self) -> Glance | None:
        """What was read last, if the store has answered since it was last asked."""
        return None if self._glance.error is not None else self._glance.answer

    @property
    def counted(self) -> Counted | None:
        """What was counted last."""
        return self._counted.answer

    @property
    def took(self) -> float:
        """Seconds that the last count took."""
        return self._counted.took

    @property
    def counting_for(self) -> float | None:
        """Seconds for which a count is under way."""
        return None if self._counted.began is None else time.monotonic() - self._counted.began

    @property
    def error(self) -> IdempotentError | None:
        """Why the queue log cannot be read."""
        return self._glance.error or self._counted.error

    @property
    def failed(self) -> list[Row]:
        """Messages that failed, those that failed last coming first; without what is known to have changed since."""
        rows = {row.key: row for row in (self.counted.failed if self.counted else ())}
        if self.glance is not None:
            rows.update((row.key, row) for row in (*self.glance.latest, *self.glance.waiting, *self.glance.unsent))
        failed = (row for row in rows.values() if _has_failed(row))
        return sorted(failed, key=_ended, reverse=True)[:LISTED]

    # -- in threads ------------------------------------------------------------------------------------------------------

    def store(self) -> Store | None:
        """Return the store, once its schema is there."""
        store = self.queue_log.store
        # Where it is made on first use, that is not ours to make.
        self._is_there = self._is_there or store.inspect()
        return store if self._is_there else None

    def _read(self) -> Glance:
        store = self.store()
        if store is None:
            return Glance(LogHealth(datetime.now(UTC)))
        return Glance(
            store.condition(),
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
    """Return the rows as a page can show them: a lone surrogate, which Redis keeps and UTF-8 has not, as an escape."""
    return [_legible(row) for row in rows]


def _legible(row: Row) -> Row:
    texts = {name: getattr(row, name) for name in _TEXTS}
    try:
        "".join(filter(None, (*astuple(row.key), *texts.values()))).encode()
    except UnicodeEncodeError:
        told: dict[str, Any] = {name: None if text is None else _escaped(text) for name, text in texts.items()}
        return replace(row, key=MessageKey(*map(_escaped, astuple(row.key))), **told)
    return row


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _good_for(took: float) -> float:
    """Seconds for which an answer is good that took so many: what reads the whole log takes no more than a twentieth of the time."""
    return max(_COUNT_GOOD, _COUNT_SHARE * took)


def _has_failed(row: Row) -> bool:
    failed = row.status is Status.DONE and row.processed_status is ProcessedStatus.FAILURE
    return failed and row.error != FORGOTTEN


def _ended(row: Row) -> datetime:
    return row.processed_timestamp or row.created_timestamp
