"""The engines that the store opens: for its own statements, and for the transactions of atomic bodies.

The store's own statements have separate connections, even if the user gave an engine: bodies may hold all of that engine's connections
for minutes, while leases have to be renewed. The set-up of these connections affects no other code.
"""

# ruff: noqa: SLF001 - an engine of ours is made here as SQLAlchemy makes its own

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import URL, Engine, Pool, QueuePool, StaticPool, create_engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry

from celery_idempotent.stores.sql.dialects import Dialect, Fault, dialect_named
from celery_idempotent.stores.sql.forks import close_before_forks
from celery_idempotent.stores.sql.sockets import has_something_to_say, notice_silence

__all__ = ["LIMITED", "beside", "close", "follow", "for_statements", "for_transactions"]

#: The key in a connection's ``info`` that says that the server limits its statements.
LIMITED = "celery_idempotent.limited"

_USED = "celery_idempotent.used"

#: Execution options: of an engine of ours for bodies; and of a body's connection, which may be an owner's engine's.
_FOLLOWS = "celery_idempotent_follows"
_OF_BODIES = {_FOLLOWS, "celery_idempotent_watch"}


def for_statements(url: URL, dialect: Dialect, limit: float) -> Engine:
    """Return an engine in autocommit.

    Args:
        url: Where to.
        dialect: What is peculiar to it.
        limit: Seconds for which the server works on a statement.
    """
    engine = _create(url, dialect, isolation_level="AUTOCOMMIT", **_without_rollbacks())
    _furnish(engine, engine.pool, dialect, limit, ours=True)
    return engine


def beside(owner: Engine, dialect: Dialect, limit: float) -> Engine | None:
    """Return such an engine on the database of a user's engine, with connections that are made like that engine's.

    Returns:
        ``None`` if the engine's pool keeps no connections, or one for all: then the user decides where they come from. Also
        on SQLite, which has only one writer at a time.
    """
    if not isinstance(owner.pool, QueuePool) or owner.dialect.name == "sqlite":
        return None
    engine = _Beside(owner)

    def commit_each(connection: Any, record: ConnectionPoolEntry) -> None:  # noqa: ARG001
        owner.dialect.set_isolation_level(connection, "AUTOCOMMIT")

    event.listen(engine.pool, "connect", commit_each)
    _furnish(engine, engine.pool, dialect, limit, ours=False)
    return engine


class _Beside(Engine):
    """A user's engine with a second pool, which is emptied with the first.

    The engine's listeners are called for statements here, too, but not for transactions: there are none, and a listener that sends
    ``BEGIN`` would begin one. How an engine is made, and listeners are joined, is read from SQLAlchemy 2.0.30 and 2.1.9, whose
    ``execution_options()`` makes engines in this way.
    """

    def __init__(self, owner: Engine) -> None:
        options = {name: value for name, value in owner.get_execution_options().items() if name != "isolation_level"}
        super().__init__(
            owner.pool.recreate(), owner.dialect, owner.url, execution_options=options, hide_parameters=True
        )
        self._owner = owner
        self._made_in = os.getpid()
        own = self.dispatch
        self.dispatch = own._join(owner.dispatch)
        for name in ("begin", "commit", "rollback", "engine_disposed"):
            setattr(self.dispatch, name, getattr(own, name))
        event.listen(owner, "engine_disposed", self._with_owner)

    @property
    def _has_events(self) -> bool:
        return self._owner._has_events or self.__dict__.get("_has_events", False)

    @_has_events.setter
    def _has_events(self, value: bool) -> None:
        self.__dict__["_has_events"] = value

    def _with_owner(self, _: Engine) -> None:
        # A forked child empties the pool that it has inherited; these connections are its parent's.
        if self._made_in == os.getpid():
            self.dispose()

    def close(self) -> None:
        event.remove(self._owner, "engine_disposed", self._with_owner)
        self.dispose()


def close(engine: Engine) -> None:
    """Close what was opened here."""
    engine.close() if isinstance(engine, _Beside) else engine.dispose()


def for_transactions(url: URL, dialect: Dialect) -> Engine:
    """Return an engine for atomic bodies. Its pool has no limit: the worker's concurrency limits how many bodies run at once."""
    engine = _create(url, dialect, max_overflow=-1, execution_options={_FOLLOWS: True})
    dialect.prepare_for_transactions(engine)
    _furnish(engine, engine.pool, dialect, None, ours=True)

    follow(engine)
    return engine


def follow(engine: Engine) -> None:
    """Have the pool drop a body's connection to a server that takes no writes any more, such as a former primary after a failover."""
    if not event.contains(engine, "handle_error", _leave):
        event.listen(engine, "handle_error", _leave)


def _leave(context: ExceptionContext) -> None:
    error, connection = context.sqlalchemy_exception, context.connection
    if (
        not isinstance(error, DBAPIError)
        or connection is None
        or _OF_BODIES.isdisjoint(connection.get_execution_options())
    ):
        return
    if dialect_named(connection.dialect.name).fault(error) is Fault.MOVED:
        context.is_disconnect = True


def _create(url: URL, dialect: Dialect, **arguments: Any) -> Engine:
    # Parameters contain messages and results, which must not be in logs and error texts.
    engine = create_engine(url, hide_parameters=True, **dialect.options(url), **arguments)
    dialect.prepare(engine)
    return engine


def _furnish(engine: Engine, pool: Pool, dialect: Dialect, limit: float | None, *, ours: bool) -> None:
    def furnish(connection: Any, record: ConnectionPoolEntry) -> None:
        descriptor = dialect.socket(connection)
        if descriptor is not None:
            notice_silence(descriptor)
        dialect.furnish(engine.dialect.loaded_dbapi, connection, limit=limit, ours=ours)
        if limit is not None:
            record.info[LIMITED] = limit

    def refuse_closed(connection: Any, record: ConnectionPoolEntry, proxy: object) -> None:  # noqa: ARG001
        """Have the pool replace a connection that its server has closed, before a statement is sent on it."""
        if _USED not in record.info:  # a new connection may have a message to read, and is not closed
            record.info[_USED] = True
            return
        descriptor = dialect.socket(connection)
        if descriptor is not None and has_something_to_say(descriptor):
            raise DisconnectionError("closed by the server")

    event.listen(pool, "connect", furnish)
    event.listen(pool, "checkout", refuse_closed)
    if engine.dialect.name == "sqlite" and not isinstance(pool, StaticPool):
        close_before_forks(engine)


def _without_rollbacks() -> dict[str, Any]:
    """Return the option by which closing a connection in autocommit sends nothing, where SQLAlchemy has it (2.0.43)."""
    return {"skip_autocommit_rollback": True} if hasattr(DefaultDialect, "detect_autocommit_setting") else {}
