"""SQLite and forks: a process that is forked while one of its threads works on a file leaves the child locked out for good.

SQLite keeps in the memory of the process, per file, which locks that process has. A child inherits this book-keeping as it was at
the fork, and with it the lock of a statement that no thread of its own will ever finish: to whatever it asks, the answer is
"database is locked". So forks wait for statements, statements for forks, and no connection is open in between. A prefork worker
forks while it works: it replaces a child that died, while it ends that child's claim, renews leases and recovers.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet

from sqlalchemy import Engine, StaticPool

__all__ = ["close_before_forks", "turn"]

#: Taken for a statement on a file, and by whoever forks.
_turn = threading.RLock()

_engines: WeakSet[Engine] = WeakSet()


def turn() -> AbstractContextManager[Any]:
    """What to hold while working on a file."""
    return _turn


def close_before_forks(engine: Engine) -> None:
    """Have the connections in an engine's pool closed before this process is forked; one in memory stays."""
    if not isinstance(engine.pool, StaticPool):
        _engines.add(engine)


def _before() -> None:
    _turn.acquire()
    for engine in list(_engines):
        engine.dispose()


os.register_at_fork(before=_before, after_in_parent=_turn.release, after_in_child=_turn.release)
