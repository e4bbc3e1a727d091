"""The port of a store whose verbs can be part of its users' transactions."""

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
    """How a transaction stands in the database."""

    OPEN = auto()
    FAILED = auto()  # the database has given it up: its commit would be a rollback, without an error
    NONE = auto()  # nothing has begun one yet, or it was ended
    UNKNOWN = auto()  # the driver does not tell: how a commit went is known by what is there afterwards


class Surrounding(Protocol):
    """A transaction that a framework has begun, and ends."""

    def connect(self) -> Connection:
        """Return its connection."""
        ...

    def after_commit(self, hook: Callable[[], None]) -> None:
        """Have a hook called after the commit, if what is written here and now is committed."""
        ...

    def last_hook(self) -> Callable[[], None] | None:
        """Return the last hook, if it is called exactly when one that were given now would be, and right before that."""
        ...


class TransactionalStore(Store, Protocol):
    """A store in a database that can hold its users' tables too: what ``atomic=True`` needs."""

    #: Whether bodies write on a connection that they do not ask the unit of work for, so that its transaction begins before them.
    begins_before_body: ClassVar[bool]

    def surrounding(self) -> Surrounding | None:
        """Return the transaction of a framework that a call is made in, here and now."""
        ...

    def watch(self, connection: Connection, note: Callable[[BaseException], None]) -> None:
        """Have errors noted that the framework's own statements meet in a transaction, until it ends.

        Args:
            connection: In the transaction.
            note: Called with each.
        """
        ...

    @property
    def engine(self) -> Engine:
        """An engine for transactions on the store's database, one per process."""
        ...

    def within(self, connection: Connection) -> Store:
        """Return the same store, with its verbs in a transaction of the caller's.

        What they write takes effect, and is seen by others, when the caller commits. Nothing is repeated. Errors are the database's own,
        and the caller decides what becomes of the transaction. Finding a message does not lock it, where the database leaves the choice
        (MySQL and MariaDB keep a shared lock on its row until the transaction ends).

        Args:
            connection: One of :attr:`engine`'s database, in a transaction.

        Raises:
            ConfigurationError: It is a connection to another kind of database.
            SchemaError: The table is not there; by the verbs, too, where the connection leads to a database that lacks it.
        """
        ...

    def recorded(self, keys: Sequence[MessageKey]) -> Mapping[MessageKey, str]:
        """Return which of these messages have a row now, in any status, and the Celery task id that each was recorded under.

        Args:
            keys: The messages; an empty list asks nothing.

        Atomicity: one statement for some hundreds of rows.
        """
        ...

    def transaction_status(self, connection: Connection) -> TransactionStatus:
        """Return how a connection's transaction stands in the database, as its driver heard last. Asks the database nothing."""
        ...

    def gave_way(self, error: BaseException) -> bool:
        """Return whether a transaction that met an error took no effect, and may if all of it is done again.

        So it is after a deadlock, a serialization failure or a lock that was waited for in vain; after a connection that broke,
        unless it broke while the transaction was being committed; and when the database takes nothing for now, as while it is read-only.
        """
        ...

    def collided(self, error: BaseException) -> bool:
        """Return whether it did so in favour of another transaction: a deadlock, a serialization failure, a lock that was waited for in vain."""
        ...
