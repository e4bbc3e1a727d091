"""``with outbox(...)``: calls are recorded in a transaction, with what it writes otherwise, and published once it has committed.

With a session or a connection the transaction is the user's; without one the block is a batch.
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

#: Where a session keeps its outbox.
_INFO = "celery_idempotent_outbox"


def outbox(
    session: Session | scoped_session[Any] | Connection | None = None,
) -> AbstractContextManager[None]:
    """Record the calls of the block, and publish them when they are committed.

    With a session, ``delay``, ``apply_async`` and signatures of an ``IdempotentTask`` (groups, chains and chords too) write their
    message to ``queue_log`` in the session's transaction, and are published right after its commit, wherever that is::

        with outbox(session):
            session.add(order)
            charge.delay(order.id, 500)
            session.commit()

    A rollback, of a savepoint too, leaves nothing of them. A process that dies after the commit, and a broker that takes nothing
    then, leave rows that the relay publishes. Duplicates are told, or raised, at the call.

    Without one, the block is a batch: its calls are recorded at its end, some hundreds in one statement, and published by one
    producer. Their results know from then on whether they were duplicates (``result.duplicate``, ``None`` before). An error that
    leaves the block leaves nothing recorded. Inside of another outbox, and of an atomic task, a batch joins its transaction.

    Args:
        session: A SQLAlchemy session, or a registry of them such as Flask-SQLAlchemy's ``db.session``, on the store's database.
            With Core, a connection; the block has to be around its transaction then: what is committed later is left to the
            relay. ``None`` for a batch.

    Raises:
        ConfigurationError: It is no such session, leads to another kind of database, or the store has no transactions.
        ExceptionGroup: At the end of a batch, of the DuplicateMessageError and MessageMismatchError of single calls; all others
            were sent.
        StoreUnavailableError: At the end of a batch: the store gave no answer. Nothing was sent, or (beyond some hundreds) the
            first of them; the error says so.

    Hazard:
        Calls by name (``send_task``) and of tasks that are no ``IdempotentTask`` are published at once, with a warning in the log.
        A result must not be waited for inside of the block.

    Atomicity: with a session, its transaction. A batch is as many calls: each is recorded and sent, or not.
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
            "outbox() takes a plain Session: with an AsyncSession put the block into a function of it, and call "
            "`await session.run_sync(function)`"
        )
    raise ConfigurationError(f"outbox() takes a SQLAlchemy session or connection, not {type(session).__name__}")


# -- with a session ----------------------------------------------------------------------------------------------------------


class _SessionOutbox(Outbox):
    """The outbox of a session, for as long as that lives: it may commit after the block."""

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
                "outbox(session) needs a session with a default bind, the store's database; this one has binds for single tables only"
            ) from error

    def _after_begin(self, session: Session, transaction: SessionTransaction, connection: Connection) -> None:  # noqa: ARG002
        begin_before_savepoints(connection)

    def _after_commit(self, session: Session) -> None:
        # Not of a savepoint; nor of a session inside of somebody's transaction, whose commit nobody tells us of.
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
    """Yield an outbox around the transactions of a connection, which tells of a commit before it takes place."""
    from sqlalchemy import event

    box = Outbox(lambda: connection)
    commits = False

    def commit(_: Connection) -> None:
        nonlocal commits
        commits = True

    def began(_: Connection) -> None:
        nonlocal commits
        if commits:  # which took place, or there would be no other one
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
