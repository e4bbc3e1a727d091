"""``with outbox(...)``: record calls in the user's transaction, and publish them after it commits.

Without a session or a connection, the block is a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

from celery_idempotent.core.begin import begin_before_savepoints
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.producer.batch import batch
from celery_idempotent.producer.box import Outbox, within

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, SessionTransaction, scoped_session

__all__ = ["outbox"]

#: The key of a session's outbox in ``session.info``.
_INFO = "celery_idempotent_outbox"


def outbox(
    session: Session | scoped_session[Any] | Connection | None = None,
) -> AbstractContextManager[None]:
    """Record the calls of the block, and publish them when they are committed.

    With a session, ``delay``, ``apply_async`` and signatures of an ``IdempotentTask`` (groups, chains and chords too) write their
    message to ``queue_log`` in the session's transaction. They are published right after its commit, in the block or after it::

        with outbox(session):
            session.add(order)
            charge.delay(order.id, 500)
            session.commit()

    A rollback, also of a savepoint, removes them. If the process dies after the commit, or the broker is down, the relay publishes
    the rows. A duplicate is returned, or raised, at the call.

    Without a session, the block is a batch: its calls are recorded at its end, some hundreds in one statement, and published by one
    producer. After that, ``result.duplicate`` says whether a call was a duplicate; before, it is ``None``. If an error leaves the
    block, nothing is recorded. In another outbox, or in an atomic task, a batch joins the transaction.

    Args:
        session: A SQLAlchemy session, or a registry of sessions such as Flask-SQLAlchemy's ``db.session``, on the store's database.
            With Core, a connection. The block must then enclose its transaction; messages committed after the block are left to the
            relay. ``None`` for a batch.

    Raises:
        ConfigurationError: It is not such a session, its database is of another kind, or the store has no transactions.
        ExceptionGroup: At the end of a batch, with the DuplicateMessageError and MessageMismatchError of single calls. All other
            calls were sent.
        StoreUnavailableError: At the end of a batch, if the store does not answer. No call was sent or, beyond some hundreds,
            only the first ones; the error says which.

    Hazard:
        Calls by name (``send_task``), and calls of tasks that are not an ``IdempotentTask``, are published at once, with a warning in
        the log. Do not wait for a result inside the block.

    Atomicity: with a session, its transaction. In a batch, each call on its own is recorded and sent, or not.
    """
    if session is None:
        return batch()
    if callable(registry := getattr(session, "registry", None)) and not hasattr(session, "sync_session"):
        session = cast("Session", registry())
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    if isinstance(session, Session):
        return within(_of_session(session))
    if isinstance(session, Connection):
        return _around(session)
    if hasattr(session, "run_sync"):
        raise ConfigurationError(
            "outbox() takes a plain Session: with an AsyncSession, put the block into a function of the session, and call "
            "`await session.run_sync(function)`"
        )
    raise ConfigurationError(f"outbox() takes a SQLAlchemy session or connection, not {type(session).__name__}")


# -- with a session ----------------------------------------------------------------------------------------------------------


class _SessionOutbox(Outbox):
    """The outbox of a session. It lives as long as the session, which may commit after the block."""

    def __init__(self, session: Session) -> None:
        from sqlalchemy import event

        super().__init__(self._connection_of_session)
        self._session = session
        self._committed = False
        event.listen(session, "after_begin", self._after_begin)
        event.listen(session, "after_commit", self._after_commit)
        event.listen(session, "after_transaction_end", self._after_end)

    def _connection_of_session(self) -> Connection:
        from sqlalchemy.exc import UnboundExecutionError

        try:
            return self._session.connection()
        except UnboundExecutionError as error:
            raise ConfigurationError(
                "outbox(session) needs a session whose default bind is the store's database; this one has binds for single tables only"
            ) from error

    def _after_begin(self, session: Session, transaction: SessionTransaction, connection: Connection) -> None:  # noqa: ARG002
        begin_before_savepoints(connection)

    def _after_commit(self, session: Session) -> None:
        # Ignore savepoints, and a session inside a user's own transaction, whose commit is not reported.
        outermost = not session.in_nested_transaction()
        self._committed = outermost and self._connection is not None and not self._connection.in_transaction()

    def _after_end(self, session: Session, transaction: SessionTransaction) -> None:  # noqa: ARG002 - SQLAlchemy's signature
        if transaction.parent is not None:
            return
        committed, self._committed = self._committed, False
        if committed:
            self.publish()
        else:
            self.discard()


def _of_session(session: Session) -> Outbox:
    found: Outbox | None = session.info.get(_INFO)
    if found is None:
        found = session.info[_INFO] = _SessionOutbox(session)
        if session.in_transaction() and session.get_bind().dialect.name == "sqlite":
            begin_before_savepoints(session.connection())
    return found


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
