"""Time limits are for the body: the soft one is kept from striking before that begins, and after it has ended.

Celery counts from when a pool's process accepts a message. Its soft limit is a signal, raised as an error wherever the process is: so also
while the message waits for its claim, which would end it without having run, or while the outcome of its body is written.
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

#: Seconds. What did not wait for longer did not wait.
_AT_ONCE = 0.1


class _Process:
    """The soft limit of a pool's process, which runs one body at a time."""

    def __init__(self) -> None:
        #: Whose limit is not to strike now.
        self.put_off: TimeLimits | None = None
        self._pid: int | None = None
        self._struck_by_signal = False

    @property
    def is_struck_by_signal(self) -> bool:
        """Whether Celery strikes by its signal here, in a child of ``prefork``; the handler is ours then."""
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
        #: Whether the soft limit would have struck where it was put off.
        self.struck = False
        self._began = time.monotonic()
        # An eager run has none of its own: it is a part of the body that it is called in.
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
        """Whether so much went by already that the body would not have its time."""
        passed = time.monotonic() - self._began
        return self.struck or (passed > _AT_ONCE and passed > self.patience)  # it takes long to read settings

    def without(self, do: Callable[[], T]) -> T:
        """Do something without the soft limit."""
        if not self._by_signal:
            return do()
        _process.put_off = self
        try:
            return do()
        finally:
            _process.put_off = None

    def within(self, body: Callable[[], T]) -> T:
        """Run the body inside of what is done without the soft limit.

        Raises:
            SoftTimeLimitExceeded: It strikes, or would have since the last run of the body.
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
