"""Keep the soft time limit from striking before the body begins, and after it has ended.

Celery counts from when a pool's process accepts a message. Its soft limit is a signal that raises an error anywhere in the process. So it
could strike while the message waits for its claim, and end it without having run; or while the body's outcome is written.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from billiard.pool import SIG_SOFT_TIMEOUT, soft_timeout_sighandler
from celery.exceptions import SoftTimeLimitExceeded

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_idempotent.producer.guarded import Guarded

__all__ = ["TimeLimits"]

T = TypeVar("T")

#: Seconds. A shorter wait does not count.
_AT_ONCE = 0.1


class _Process:
    """The soft limit of a pool's child, which runs one body at a time."""

    def __init__(self) -> None:
        #: The delivery whose soft limit must not strike now.
        self.put_off: TimeLimits | None = None
        self._pid: int | None = None
        self._struck_by_signal = False

    @property
    def is_struck_by_signal(self) -> bool:
        """Whether this is a child of ``prefork``, where the limit is a signal. Its handler is then replaced by ours."""
        if self._pid != os.getpid():
            here = SIG_SOFT_TIMEOUT is not None and threading.current_thread() is threading.main_thread()
            self._struck_by_signal = here and signal.getsignal(SIG_SOFT_TIMEOUT) is soft_timeout_sighandler
            self._pid = os.getpid()
            if self._struck_by_signal:
                signal.signal(SIG_SOFT_TIMEOUT, self.strike)
        return self._struck_by_signal

    def strike(self, signum: int, frame: Any) -> None:
        if self.put_off is None:
            soft_timeout_sighandler(signum, frame)
        else:
            self.put_off.struck = True


_process = _Process()


class TimeLimits:
    """The time limits of one delivery."""

    def __init__(self, task: Guarded, request: Context) -> None:
        self._task = task
        self._request = request
        #: Whether the soft limit struck while it was put off.
        self.struck = False
        self._began = time.monotonic()
        # An eager run has no limits of its own: it is part of the body that calls it.
        self._by_signal = not request.is_eager and _process.is_struck_by_signal

    @cached_property
    def patience(self) -> float:
        """Seconds for which a message may wait for its claim: half of the shortest limit."""
        task, conf = self._task, self._task.app.conf
        given = (*(self._request.timelimit or ()), task.time_limit, task.soft_time_limit)
        limits = [limit for limit in (*given, conf.task_time_limit, conf.task_soft_time_limit) if limit]
        return min(map(float, limits), default=float("inf")) / 2

    @property
    def spent(self) -> bool:
        """Whether the wait has used up too much of the body's time."""
        passed = time.monotonic() - self._began
        return self.struck or (passed > _AT_ONCE and passed > self.patience)  # `patience` reads settings, which is slow

    def without(self, do: Callable[[], T]) -> T:
        """Call ``do`` with the soft limit put off."""
        if not self._by_signal:
            return do()
        _process.put_off = self
        try:
            return do()
        finally:
            _process.put_off = None

    def put_off(self, do: Callable[[], T]) -> T:
        """Call ``do`` in the body with the soft limit put off until it has returned.

        Raises:
            SoftTimeLimitExceeded: The limit struck meanwhile.
        """
        before = self.struck
        answer = self.without(do)
        if self.struck and not before:
            raise SoftTimeLimitExceeded
        return answer

    def within(self, body: Callable[[], T]) -> T:
        """Run the body with the soft limit, inside :meth:`without`.

        Raises:
            SoftTimeLimitExceeded: The limit strikes, or struck while it was put off.
        """
        if not self._by_signal:
            return body()
        _process.put_off = None
        try:
            if self.struck:
                raise SoftTimeLimitExceeded
            return body()
        finally:
            _process.put_off = self
