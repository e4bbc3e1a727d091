"""``with outbox(...)``: record calls in the user's transaction, and publish them after it commits.

Without a session or a connection, the block is a batch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    ContextDecorator,
    asynccontextmanager,
    contextmanager,
)
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from celery_idempotent.core.begin import begin_before_savepoints
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.producer.batch import awaited_batch, batch
from celery_idempotent.producer.box import Outbox, within
from celery_idempotent.producer.session_outbox import of_session

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
    from sqlalchemy.orm import Session, scoped_session

__all__ = ["OutboxBlock", "outbox"]


class OutboxBlock(ContextDecorator, AbstractContextManager[None], AbstractAsyncContextManager[None]):
    """What :func:`outbox` returns, for ``with`` and ``async with``.

    Args:
        enter: Makes what ``with`` enters.
        enter_awaited: Makes what ``async with`` enters.
    """

    def __init__(
        self,
        enter: Callable[[], AbstractContextManager[None]],
        enter_awaited: Callable[[], AbstractAsyncContextManager[None]],
    ) -> None:
        self._enter = enter
        self._enter_awaited = enter_awaited

    def _recreate_cm(self) -> OutboxBlock:
        return OutboxBlock(self._enter, self._enter_awaited)

    def __enter__(self) -> None:
        self._entered = self._enter()
        self._entered.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._entered.__exit__(kind, error, traceback)

    async def __aenter__(self) -> None:
        self._awaited = self._enter_awaited()
        await self._awaited.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._awaited.__aexit__(kind, error, traceback)


def outbox(
    session: Session | scoped_session[Any] | AsyncSession | async_scoped_session[Any] | Connection | None = None,
) -> OutboxBlock:
    """Record the calls of the block, and publish them when they are committed.

    With a session, ``delay``, ``apply_async`` and signatures of an ``IdempotentTask`` (groups, chains and chords too) write their
    message to ``queue_log`` in the session's transaction. They are published right after its commit, in the block or after it::

        with outbox(session):
            session.add(order)
            charge.delay(order.id, 500)
            session.commit()

    A rollback, also of a savepoint, removes them. If the process dies after the commit, or the broker is down, the relay publishes
    the rows. A duplicate is returned, or raised, at the call.

    With an ``AsyncSession``, write ``async with``. An awaited call is recorded at once. A plain call cannot wait for the database, so the commit
    records it, and raises its refusal; until then ``result.duplicate`` is ``None``. The commit publishes in a thread::

        async with outbox(session):
            session.add(order)
            await charge.adelay(order.id, 500)
            await session.commit()

    Without a session, the block is a batch: its calls are recorded at its end, some hundreds in one statement, and published by one
    producer. After that, ``result.duplicate`` says whether a call was a duplicate; before, it is ``None``. If an error leaves the
    block, nothing is recorded. In another outbox, or in an atomic task, a batch joins the transaction. With ``async with``, the event loop goes
    on while it is sent.

    Args:
        session: A SQLAlchemy session, or a registry of sessions such as Flask-SQLAlchemy's ``db.session``, on the store's database.
            With Core, a connection. The block must then enclose its transaction; messages committed after the block are left to the
            relay. ``None`` for a batch.

    Raises:
        ConfigurationError: It is not such a session, its database is of another kind, or the store has no transactions. Or ``with`` was
            written for an ``AsyncSession``.
        ExceptionGroup: At the end of a batch, or at the commit of an ``AsyncSession``, with the DuplicateMessageError and
            MessageMismatchError of single calls. All other calls were sent; at the commit, they were recorded, and the transaction is still
            open: roll it back, or commit again without the refused calls.
        StoreUnavailableError: At the end of a batch, if the store does not answer. No call was sent or, beyond some hundreds,
            only the first ones; the error says which.

    Hazard:
        Calls by name (``send_task``), and calls of tasks that are not an ``IdempotentTask``, are published at once, with a warning in
        the log. Do not wait for a result inside the block.

    Atomicity: with a session, its transaction. In a batch, each call on its own is recorded and sent, or not.
    """
    if session is None:
        return OutboxBlock(batch, awaited_batch)
    if callable(registry := getattr(session, "registry", None)):
        session = cast("Session | AsyncSession", registry())
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    if isinstance(session, Session):
        return _inline(partial(within, of_session(session)))
    if isinstance(session, Connection):
        return _inline(partial(_around, session))
    if isinstance(getattr(session, "sync_session", None), Session):
        return OutboxBlock(_refuse_with, partial(_of_async_session, cast("AsyncSession", session)))
    if hasattr(session, "run_sync"):
        raise ConfigurationError(
            "outbox() takes an AsyncSession, but no AsyncConnection: put the block into a function of the connection, and call "
            "`await connection.run_sync(function)`"
        )
    raise ConfigurationError(f"outbox() takes a SQLAlchemy session or connection, not {type(session).__name__}")


def _inline(enter: Callable[[], AbstractContextManager[None]]) -> OutboxBlock:
    @asynccontextmanager
    async def enter_awaited() -> AsyncIterator[None]:
        with enter():
            yield

    return OutboxBlock(enter, enter_awaited)


@asynccontextmanager
async def _of_async_session(session: AsyncSession) -> AsyncIterator[None]:
    box = await session.run_sync(of_session)
    with within(box):
        yield


def _refuse_with() -> AbstractContextManager[None]:
    raise ConfigurationError("outbox() of an AsyncSession needs `async with`")


# -- with a connection -------------------------------------------------------------------------------------------------------


@contextmanager
def _around(connection: Connection) -> Iterator[None]:
    """Yield an outbox for the transactions of a connection, whose event precedes the commit."""
    from sqlalchemy import event

    box = Outbox(lambda: connection)
    commits = False

    def commit(_: Connection) -> None:
        nonlocal commits
        commits = True

    def began(_: Connection) -> None:
        nonlocal commits
        if commits:  # the commit succeeded, since the next transaction begins
            commits = False
            box.publish()

    def rollback(_: Connection) -> None:
        box.discard()

    begin_before_savepoints(connection)
    listeners = (("commit", commit), ("begin", began), ("rollback", rollback))
    for name, listener in listeners:
        event.listen(connection, name, listener)
    try:
        with within(box):
            yield
        if commits and not connection.in_transaction():
            box.publish()
    finally:
        for name, listener in listeners:
            event.remove(connection, name, listener)
