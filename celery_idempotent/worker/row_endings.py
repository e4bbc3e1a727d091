"""End rows of messages that ran without the guard, in a thread: a store that is away must not hold their tasks.

A task waits for its row a moment, so that the row has ended before the broker gets its acknowledgement. While the store gives no answer,
nothing waits: the thread asks again as long as the process lives.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from celery_idempotent.core.backoff import Backoff
from celery_idempotent.core.fork_lock import no_fork
from celery_idempotent.errors import StoreUnavailableError

if TYPE_CHECKING:
    from celery_idempotent.queue_log import QueueLog

__all__ = ["RowEndings"]

logger = logging.getLogger("celery_idempotent")

#: Seconds that a task waits for its row.
_WAIT = 1.0

#: How many rows wait for the store at most. Those beyond stay as they are.
_AT_MOST = 10_000

_BACKOFF = Backoff(0.5, longest=30.0)


@dataclass(slots=True)
class _Ending:
    whose: str
    write: Callable[[], object]
    over: threading.Event = field(default_factory=threading.Event)


class RowEndings:
    """The rows that this process still has to end, for one queue log."""

    def __init__(self) -> None:
        # By process id: a forked child inherits the rows, but not the thread.
        self._endings: dict[int, _Endings] = {}

    @classmethod
    def of(cls, queue_log: QueueLog) -> RowEndings:
        """Return the queue log's rows to end."""
        return queue_log.part(cls, cls)

    def add(self, whose: str, write: Callable[[], object], *, wait: bool) -> None:
        """End a row.

        Args:
            whose: The message, for the log.
            write: Asks the store.
            wait: Whether to wait for it a moment, if the store has answered last time.
        """
        pid = os.getpid()
        endings = self._endings.get(pid)
        if endings is None:
            self._endings = {pid: (endings := _Endings())}
        endings.add(_Ending(whose, write), wait=wait)

    def rest(self) -> None:
        """Give up the rows that are left, because the app is closed."""
        for endings in self._endings.values():
            endings.rest()


class _Endings:
    """The same, in one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: deque[_Ending] = deque()
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._answers = True

    def add(self, ending: _Ending, *, wait: bool) -> None:
        with self._lock:
            if len(self._left) >= _AT_MOST:
                logger.error(
                    "%s ran without the guard, and its row stays as it is: too many wait for the store", ending.whose
                )
                return
            self._left.append(ending)
            if self._thread is None:
                self._stopped.clear()
                self._thread = threading.Thread(target=self._run, name="celery_idempotent_endings", daemon=True)
                self._thread.start()
        if wait and self._answers and not ending.over.wait(_WAIT):
            self._answers = False

    def rest(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        failures = 0
        while True:
            with self._lock:
                if not self._left or self._stopped.is_set():
                    if self._left:
                        logger.error("%d rows of messages that ran without the guard stay as they are", len(self._left))
                        self._left.clear()
                    self._thread = None
                    return
                ending = self._left[0]
            try:
                with no_fork():
                    ending.write()
            except StoreUnavailableError as error:
                self._answers = False
                failures += 1
                if failures == 1:
                    logger.error(
                        "%s ran without the guard; its row, and those after it, are ended once the store answers: %s",
                        ending.whose,
                        error,
                    )
                self._stopped.wait(_BACKOFF.pause(failures))
                continue
            except Exception as error:  # noqa: BLE001 - the rows after it must be ended, whatever the error
                logger.error("%s ran without the guard, and its row stays as it is: %r", ending.whose, error)
            else:
                self._answers = True
            failures = 0
            with self._lock:
                self._left.popleft()
            ending.over.set()
