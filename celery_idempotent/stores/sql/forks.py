"""SQLite and forks: a process that is forked while one of its threads works on a file leaves the child locked out for good.

SQLite keeps in the memory of the process, per file, which locks that process has. A child inherits this book-keeping as it was at
the fork. That includes the lock of a statement which no thread of the child will ever finish, so that everything it asks is answered by
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
    """Have the connections in an engine's pool closed before this process is forked; one in memory stays."""
    if not isinstance(engine.pool, StaticPool):
        _engines.add(engine)


def _close() -> None:
    for engine in list(_engines):
        engine.dispose()


before_forks(_close)
