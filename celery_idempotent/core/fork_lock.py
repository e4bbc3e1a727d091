"""Threads and forks: a process does not fork while one of our threads works on a statement or a publication.

A child inherits the locks that its parent's threads hold, but not the threads: code that needs such a lock never gets it. A prefork worker
forks while it works, because it replaces children that died. At the same time its main process ends their claims, renews leases and
publishes messages again. So forks and this work wait for each other.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["before_forks", "no_fork"]

#: Seconds that a fork waits. A publication to a silent broker may never end, and no worker must wait that long to replace a child.
PATIENCE = 10.0


class _Turns:
    """Lets either a thread that must not be forked run, or the one that forks."""

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
        self.lock = threading.RLock()  # the thread that may hold the other one does not exist in the child


_turns = _Turns()
os.register_at_fork(
    before=_turns.before_fork,
    after_in_parent=_turns.after_fork_in_parent,
    after_in_child=_turns.after_fork_in_child,
)


def no_fork() -> AbstractContextManager[Any]:
    """Return the lock that a thread of ours holds during one statement or one publication."""
    return _turns.lock


def before_forks(callback: Callable[[], object]) -> None:
    """Call a function before each fork of this process, while none of our threads is at work."""
    _turns.callbacks.append(callback)
