"""Watch the transaction of an atomic body, by SQLAlchemy's events and the driver's status after each statement.

The body shares its transaction with the completion of its message. If anything ends it earlier, the message would succeed with half of
its effects.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING

from celery_idempotent.core.store import TransactionStatus
from celery_idempotent.errors import IdempotentError

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext

    from celery_idempotent.core.store import TransactionalStore

__all__ = ["Phase", "Setback", "TransactionWatch", "given_up_error"]

#: The execution option that holds a connection's watch.
_WATCH = "celery_idempotent_watch"

#: Statements that end a transaction; on MySQL, beginning another one does too.
_ENDING = re.compile(
    r"(?: \s | --[^\n]*\n | /\*.*?\*/ )* ( (?:commit | end | abort | begin | start\s+transaction)\b | rollback\b(?! \s+ (?: (?:work|transaction)\s+ )? to\b ) )",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)

_NOTHING_KEPT = "nothing of it is kept"


class Setback(Enum):
    """Why the transaction of a body gave way."""

    COLLIDED = auto()  # another transaction went first
    BROKE = auto()  # its connection broke, or the database takes no writes for now
    NOT_CONNECTED = auto()  # no connection could be opened


class Phase(Enum):
    """The phase of a transaction."""

    OPENING = auto()
    IN_BODY = auto()
    COMMITTING = auto()


def given_up_error() -> IdempotentError:
    """Return the error for a commit that the database turned, or would turn, into a rollback."""
    return IdempotentError(
        "the transaction of this atomic body was not committed: a statement in it failed, the error was caught, and so the database "
        "rolled it back; run what may fail in begin_nested()"
    )


def _ended_error(how: str, kept: str = _NOTHING_KEPT) -> IdempotentError:
    return IdempotentError(
        f"the body of an atomic task ended its transaction itself, {how}: {kept}. Leave that out: the transaction is committed when the "
        "body returns. To undo a part use begin_nested(), to undo all of it raise an error"
    )


class TransactionWatch:
    """The state of one transaction.

    Args:
        store: The store in the transaction's database.

    Attributes:
        phase: Its phase.
        gave_way: The error with which the database ended the transaction, or a statement of it. Even if the body caught it, earlier
            writes may be gone.
        setback: Why it gave way.
        in_doubt: Whether a commit was asked for and its outcome is unknown.
        rolled_back: Whether SQLAlchemy has rolled it back.
    """

    def __init__(self, store: TransactionalStore) -> None:
        self._store = store
        self.phase = Phase.OPENING
        self.gave_way: BaseException | None = None
        self.setback: Setback | None = None
        self.in_doubt = False
        self.rolled_back = False
        self._status = TransactionStatus.NONE
        #: Whether the driver has reported the transaction as begun.
        self._entered = False
        #: The error for a body that ended it.
        self._ended: IdempotentError | None = None

    def watch(self, connection: Connection) -> None:
        """Watch a connection from now on. The listeners stay on its engine, and ignore connections without a watch."""
        from sqlalchemy import event

        for name, listener in _LISTENERS.items():
            if not event.contains(connection.engine, name, listener):
                event.listen(connection.engine, name, listener)
        connection.execution_options(**{_WATCH: self})

    def is_intact(self, connection: Connection) -> bool:
        """Return whether SQLAlchemy's transaction is still open and was not rolled back."""
        transaction = connection.get_transaction()
        return transaction is not None and transaction.is_active and not self.rolled_back

    def refuse_ended(self, connection: Connection) -> None:
        """Refuse to complete a message in a transaction that was ended, or that the database gave up.

        Raises:
            IdempotentError: It was.
        """
        if not self.is_intact(connection):
            raise _ended_error("by rollback() or close(), or by an error of a flush that it caught")
        self._look(connection)
        if self._ended is not None:
            raise self._ended
        if self._status is TransactionStatus.FAILED:
            raise given_up_error()

    def committed(self) -> None:
        """Note that a commit returned. If the driver does not report a transaction's status, the commit stays in doubt."""
        self.in_doubt = self._status is TransactionStatus.UNKNOWN

    # -- events --------------------------------------------------------------------------------------------------------

    def on_error(self, error: BaseException) -> None:
        """Note a statement's error, if the transaction gave way."""
        if self.gave_way is None and self._store.gave_way(error):
            self.gave_way = error
            self.setback = Setback.COLLIDED if self._store.collided(error) else Setback.BROKE

    def before_statement(self, connection: Connection, statement: str) -> None:
        """Refuse a statement that ends the transaction.

        Raises:
            IdempotentError: It would, or the transaction was found to have ended before it.
        """
        if self.phase is Phase.OPENING:
            return
        ending = _ENDING.match(statement)
        if ending is not None and self._ended is None:
            self._ended = _ended_error(f"by the statement {ending[1].upper()}")
            raise self._ended
        self.after_statement(connection)

    def after_statement(self, connection: Connection) -> None:
        """Check that the transaction is still open.

        Raises:
            IdempotentError: It has just ended.
        """
        ended = self._ended
        self._look(connection)
        if self._ended is not None and self._ended is not ended:
            raise self._ended

    def before_commit(self, connection: Connection) -> None:
        """Refuse a commit by the body, and one that the database would turn into a rollback.

        Raises:
            IdempotentError: It is one of these.
        """
        if self.phase is not Phase.COMMITTING:
            raise IdempotentError(
                "the body of an atomic task is committed when it ends, together with its message, and not before: leave commit() out "
                "(with session.begin() too)"
            )
        # The completion is written, but a listener of the session's commit may have ended the transaction since.
        self.refuse_ended(connection)
        self.in_doubt = True

    def _look(self, connection: Connection) -> None:
        """Read the transaction's status from the driver, and note if it was ended."""
        self._status = status = self._store.transaction_status(connection)
        if status is TransactionStatus.NONE and self._entered and self._ended is None:
            self._ended = _ended_error(
                "by a statement that commits by itself, as CREATE TABLE does on MySQL, or by words to the driver",
                "what it wrote before that may be committed",
            )
        self._entered = self._entered or status in (TransactionStatus.OPEN, TransactionStatus.FAILED)


# -- listeners of an engine, which may be the application's: they run for all its connections, also those without a watch -----


def _watch_of(connection: Connection | None) -> TransactionWatch | None:
    return None if connection is None else connection.get_execution_options().get(_WATCH)


def _on_error(context: ExceptionContext) -> None:
    watch = _watch_of(context.connection)
    if watch is not None and context.sqlalchemy_exception is not None:
        watch.on_error(context.sqlalchemy_exception)


def _before_statement(connection: Connection, _cursor: object, statement: str, *_: object) -> None:
    watch = _watch_of(connection)
    if watch is not None:
        watch.before_statement(connection, statement)


def _after_statement(connection: Connection, *_: object) -> None:
    watch = _watch_of(connection)
    if watch is not None and watch.phase is not Phase.OPENING:
        watch.after_statement(connection)


def _on_commit(connection: Connection) -> None:
    watch = _watch_of(connection)
    if watch is not None:
        watch.before_commit(connection)


def _on_rollback(connection: Connection) -> None:
    watch = _watch_of(connection)
    if watch is not None:
        watch.rolled_back = True


_LISTENERS: dict[str, Callable[..., None]] = {
    "handle_error": _on_error,
    "before_cursor_execute": _before_statement,
    "after_cursor_execute": _after_statement,
    "commit": _on_commit,
    "rollback": _on_rollback,
}
