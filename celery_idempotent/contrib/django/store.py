"""The queue log in one of Django's databases: ``django://`` and an alias."""

# ruff: noqa: D102 - documented in the port

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

from asgiref.sync import sync_to_async
from django.db import Error
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from celery_idempotent.contrib.django.connections import Alias, alias_of, in_test_case, in_tests, is_of_test_case
from celery_idempotent.core.records import Holder
from celery_idempotent.core.store import TransactionStatus
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.stores.sql import SQLStore
from celery_idempotent.stores.sql.connection import Attempt, Database, Joined
from celery_idempotent.stores.sql.dialects import Dialect

__all__ = ["DjangoStore"]

T = TypeVar("T")


class DjangoStore(SQLStore):
    """The queue log in the database of one of Django's aliases.

    Calls inside ``transaction.atomic()`` and atomic bodies use Django's connection. So do all statements inside a ``TestCase``. All others
    use the store's own connections, which are not in Django's pool.

    Args:
        url: ``django://`` and the alias.
        table: The table's name.

    Raises:
        ConfigurationError: There is no such alias, its database cannot hold the queue log, or it is not in autocommit.
    """

    begins_before_body: ClassVar[bool] = True

    undone_by_tests: ClassVar[bool] = True

    def __init__(self, url: str, *, table: str = "queue_log") -> None:
        self._alias = Alias(alias_of(url) or "default")
        self._shared = _Shared(self._alias)
        super().__init__(self._alias.own(), table=table)

    def __repr__(self) -> str:
        return f"DjangoStore('django://{self._alias.name}', table={self._table.fullname!r})"

    def _open(self, target: Any, dialect: Dialect, prepare: Callable[[Connection], None]) -> Database:
        return _DjangoDatabase(target, dialect, prepare, self._alias, self._shared)

    @property
    def lasting(self) -> bool:
        return super().lasting and not in_tests()

    @cached_property
    def _driven(self) -> Engine:
        return self._alias.driven()

    @property
    def engine(self) -> Engine:
        """An engine on Django's own connection, whose transactions are blocks of ``transaction.atomic()``."""
        return self._driven

    def surrounding(self) -> _Block | None:
        wrapper = self._alias.wrapper
        within = not all(map(is_of_test_case, wrapper.atomic_blocks))
        return _Block(wrapper, self._shared) if within else None

    async def off_the_loop(self, work: Callable[[], T]) -> T:
        """Run a function for a coroutine, in the thread that has Django's connections."""
        return await sync_to_async(work, thread_sensitive=True)()

    def check_worker(self) -> None:
        if self._alias.in_test_case() or self._alias.in_test_case_elsewhere():
            raise ConfigurationError(_UNSEEN)

    def renew(self, holders: Sequence[Holder], *, lease: float) -> list[Holder]:
        """Renew leases; do nothing during a ``TestCase``, whose rows the renewing thread cannot see."""
        return [] if self._alias.in_test_case_elsewhere() else super().renew(holders, lease=lease)

    def watch(self, connection: Connection, note: Callable[[BaseException], None]) -> None:  # noqa: ARG002
        wrapper = self._alias.wrapper

        def noting(execute: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return execute(*arguments)
            except Error as error:
                note(error)
                raise

        wrapper.execute_wrappers.append(noting)
        wrapper.atomic_blocks[-1].celery_idempotent = lambda: wrapper.execute_wrappers.remove(noting)

    def transaction_status(self, connection: Connection) -> TransactionStatus:
        return (
            TransactionStatus.FAILED if self._alias.wrapper.needs_rollback else super().transaction_status(connection)
        )

    def gave_way(self, error: BaseException) -> bool:
        return super().gave_way(self._as_sqlalchemy(error))

    def collided(self, error: BaseException) -> bool:
        return super().collided(self._as_sqlalchemy(error))

    def _as_sqlalchemy(self, error: BaseException) -> BaseException:
        """Return Django's error as SQLAlchemy's, around the driver's own."""
        cause = error.__cause__
        driver = self._driven.dialect.loaded_dbapi
        if not isinstance(error, Error) or not isinstance(cause, driver.Error):
            return error
        lost = self._driven.dialect.is_disconnect(cause, None, None)
        return DBAPIError.instance(
            "", None, cause, driver.Error, connection_invalidated=lost, dialect=self._driven.dialect
        )


#: Why a worker does not run during a ``TestCase``.
_UNSEEN = (
    "a TestCase keeps what it writes in a transaction of its own thread, so a worker or another thread cannot see its messages: "
    "use TransactionTestCase, or CELERY_TASK_ALWAYS_EAGER"
)


class _Shared:
    """Django's connections for SQLAlchemy, in transactions that Django begins and ends."""

    def __init__(self, alias: Alias) -> None:
        self._alias = alias
        self._engine = alias.joined()
        self._connections: WeakKeyDictionary[Any, tuple[Any, Connection]] = WeakKeyDictionary()

    def connect(self, wrapper: Any) -> Connection:
        """Return this thread's connection; a new one if Django has reconnected."""
        driver, connection = self._connections.get(wrapper, (None, None))
        if connection is None or driver is not wrapper.connection or connection.invalidated:
            connection = self._engine.connect()
            connection.begin()
            self._connections[wrapper] = (wrapper.connection, connection)
        return connection


class _Block:
    """The application's block of ``transaction.atomic()``."""

    def __init__(self, wrapper: Any, shared: _Shared) -> None:
        self._wrapper = wrapper
        self._shared = shared

    def connect(self) -> Connection:
        return self._shared.connect(self._wrapper)

    def after_commit(self, hook: Callable[[], None]) -> None:
        self._wrapper.on_commit(hook)

    def last_hook(self) -> Callable[[], None] | None:
        # Inside a TestCase, hooks of ended blocks stay in the list, and captureOnCommitCallbacks() sees only new ones.
        if not self._wrapper.run_on_commit or in_test_case(self._wrapper):
            return None
        savepoints, hook, _ = self._wrapper.run_on_commit[-1]
        return hook if savepoints == set(self._wrapper.savepoint_ids) else None


class _DjangoDatabase(Database):
    """The database of an alias; inside a ``TestCase``, each operation runs in a savepoint on Django's connection."""

    def __init__(
        self, target: Any, dialect: Dialect, prepare: Callable[[Connection], None], alias: Alias, shared: _Shared
    ) -> None:
        super().__init__(target, dialect, prepare)
        self._alias = alias
        self._shared = shared

    def run(self, operation: Callable[[Attempt], T], *, prepared: bool = True, patient: bool = False) -> T:
        wrapper = self._alias.wrapper
        if not in_test_case(wrapper):
            if self._alias.in_test_case_elsewhere():
                raise ConfigurationError(_UNSEEN)
            self._alias.refuse_forbidden()
            return super().run(operation, prepared=prepared, patient=patient)
        with self._alias.savepoint():
            joined: Joined = self.join(self._shared.connect(wrapper))
            return joined.run(operation)
