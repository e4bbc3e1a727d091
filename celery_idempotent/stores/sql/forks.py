"""SQLite and forks: if a process is forked while one of its threads works on a file, the child is locked out for good.

SQLite keeps a process's locks on a file in the memory of the process. A child inherits these as they were at the fork,
including the lock of a statement that no thread of the child will ever finish. Then SQLite answers every statement of the child with
"database is locked". So forks wait for statements, statements for forks, and no connection is open in between. A prefork worker
forks while it works: it replaces a child that died, while it ends that child's claim, renews leases and recovers.
"""

from __future__ import annotations

from weakref import WeakSet

from sqlalchemy import Engine, StaticPool

from celery_idempotent.core.fork_lock import before_forks

__all__ = ["close_before_forks"]

_engines: WeakSet[Engine] = WeakSet()


def close_before_forks(engine: Engine) -> None:
    """Close the connections in an engine's pool before each fork of this process; one in memory stays."""
    if not isinstance(engine.pool, StaticPool):
        _engines.add(engine)


def _close() -> None:
    for engine in list(_engines):
        engine.dispose()


before_forks(_close)
