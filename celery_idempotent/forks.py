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

#: Held by whoever must not be forked, and by whoever forks.
_turn = threading.RLock()

_callbacks: list[Callable[[], object]] = []


def no_fork() -> AbstractContextManager[Any]:
    """What to hold in a thread beside the worker's own, for as long as one statement or one publication takes."""
    return _turn


def before_forks(callback: Callable[[], object]) -> None:
    """Have a function called before this process is forked, when nobody is in the midst of anything any more."""
    _callbacks.append(callback)


def _before() -> None:
    _turn.acquire()
    for callback in _callbacks:
        callback()


os.register_at_fork(before=_before, after_in_parent=_turn.release, after_in_child=_turn.release)
