"""Threads and forks: a process is not forked while one of our threads is in the midst of something.

A child inherits the locks that the threads of its parent hold at the fork, and none of those threads: whatever needs such a lock waits
for ever. A prefork worker forks while it works, since it replaces children that died, and it is then that its main process ends
their claims, renews leases and publishes messages again. So forks wait for that, and that for forks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["before_forks", "no_fork"]

#: Seconds that a fork waits. A publication into a broker that says nothing may take for ever, and no worker must wait so long for
#: the child that it replaces.
PATIENCE = 10.0


class _Turns:
    """Whose turn it is: a thread's that must not be forked, or of whoever forks."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.callbacks: list[Callable[[], object]] = []
        self._forking = threading.local()

    def before_fork(self) -> None:
        self._forking.alone = self.lock.acquire(timeout=PATIENCE)
        for callback in self.callbacks:
            callback()

    def after_fork_in_parent(self) -> None:
        if self._forking.alone:
            self.lock.release()

    def after_fork_in_child(self) -> None:
        self.lock = threading.RLock()  # the thread that may hold the other one is not here


_turns = _Turns()
os.register_at_fork(
    before=_turns.before_fork,
    after_in_parent=_turns.after_fork_in_parent,
    after_in_child=_turns.after_fork_in_child,
)


def no_fork() -> AbstractContextManager[Any]:
    """Return what to hold in a thread beside the worker's own, for as long as one statement or one publication takes."""
    return _turns.lock


def before_forks(callback: Callable[[], object]) -> None:
    """Have a function called before this process is forked, when nobody is in the midst of anything any more."""
    _turns.callbacks.append(callback)
