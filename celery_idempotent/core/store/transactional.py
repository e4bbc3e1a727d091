"""The port of a store whose verbs can run in its users' transactions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, ClassVar, Protocol

from celery_idempotent.core.records import MessageKey
from celery_idempotent.core.store.port import Store

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

__all__ = ["Surrounding", "TransactionStatus", "TransactionalStore"]


class TransactionStatus(Enum):
    """The status of a transaction in the database."""

    OPEN = auto()
    FAILED = auto()  # the database gave it up: a commit would roll back without an error
    NONE = auto()  # not begun yet, or ended
    UNKNOWN = auto()  # the driver does not report it: only the rows show whether a commit succeeded


class Surrounding(Protocol):
    """A transaction that a framework begins and ends."""

    def connect(self) -> Connection:
        """Return its connection."""
        ...

    def after_commit(self, hook: Callable[[], None]) -> None:
        """Call a hook after the commit, unless a savepoint that is open now is rolled back."""
        ...

    def last_hook(self) -> Callable[[], None] | None:
        """Return the last hook, if a hook added now would run exactly when it does, right after it; else ``None``."""
        ...


class TransactionalStore(Store, Protocol):
    """A store in a database that can also hold its users' tables. ``atomic=True`` needs one."""

    #: Whether the transaction must begin before the body, because bodies do not ask the unit of work for their connection.
    begins_before_body: ClassVar[bool]

    def surrounding(self) -> Surrounding | None:
        """Return the framework's transaction that is open in this thread, if any."""
        ...

    def check_worker(self) -> None:
        """Check that a worker that starts here would see what callers record.

        Raises:
            ConfigurationError: It would not, as inside a ``TestCase`` of Django.
        """
        ...

    def watch(self, connection: Connection, note: Callable[[BaseException], None]) -> None:
        """Note errors of the framework's own statements in a transaction, until it ends.

        Args:
            connection: The transaction's.
            note: Called with each error.
        """
        ...

    @property
    def engine(self) -> Engine:
        """An engine for transactions on the store's database, one per process."""
        ...

    def within(self, connection: Connection) -> Store:
        """Return the same store, with its verbs in the caller's transaction.

        Writes take effect, and others see them, when the caller commits. Verbs are not retried. They raise the database's own errors, and
        the caller decides whether to commit or roll back. Finding a message does not lock it if the database allows that (MySQL and MariaDB
        keep a shared lock on its row until the transaction ends).

        Args:
            connection: A connection to :attr:`engine`'s database, in a transaction.

        Raises:
            ConfigurationError: The connection is to another kind of database.
            SchemaError: The table is missing. Verbs raise it too if the connection's database lacks the table.
        """
        ...

    def recorded(self, keys: Sequence[MessageKey]) -> Mapping[MessageKey, str]:
        """Return which of these messages have a row now, in any status, with the Celery task id each was recorded under.

        Args:
            keys: The messages; an empty list runs no query.

        Atomicity: one statement for some hundreds of rows.
        """
        ...

    def transaction_status(self, connection: Connection) -> TransactionStatus:
        """Return the transaction's status as the driver knows it, without a query."""
        ...

    def gave_way(self, error: BaseException) -> bool:
        """Return whether a transaction with this error took no effect, and may succeed if all of it is repeated.

        True after a deadlock, a serialization failure or a lock wait timeout; after the connection broke, unless during the commit;
        and while the database takes no writes, as when it is read-only.
        """
        ...

    def collided(self, error: BaseException) -> bool:
        """Return whether it gave way to another transaction: a deadlock, a serialization failure or a lock wait timeout."""
        ...
