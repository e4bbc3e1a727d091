"""Connections to an alias's database: the store's own, and Django's for use by SQLAlchemy."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.db import Error, connections, transaction
from django.db.backends.signals import connection_created
from django.utils.connection import ConnectionDoesNotExist
from sqlalchemy import URL, Engine, NullPool, QueuePool, create_engine, event
from sqlalchemy.exc import DisconnectionError

from celery_idempotent.contrib.django.dialects import Transactions, shared
from celery_idempotent.errors import ConfigurationError

__all__ = ["Alias", "alias_of", "in_test_case", "in_tests", "is_of_test_case"]

#: The key in a store connection's ``info`` for the name of its database.
_DATABASE = "celery_idempotent.database"


def alias_of(url: str) -> str | None:
    """Return the alias that a store's URL names; ``None`` if the URL is not one of ``django://``."""
    scheme, _, alias = url.partition("://")
    return (alias or "default") if scheme == "django" else None


class Alias:
    """An alias of ``settings.DATABASES``.

    Args:
        name: The alias.

    Raises:
        ConfigurationError: There is no such alias, its database cannot hold the queue log, or it is not in autocommit.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            wrapper = connections[name]
        except ConnectionDoesNotExist:
            raise ConfigurationError(
                f"django://{name} names no alias of DATABASES; there are {', '.join(sorted(connections))}"
            ) from None
        except ImproperlyConfigured as error:
            raise ConfigurationError(f"django://{name} needs Django's settings: {error}") from error
        if wrapper.vendor not in ("postgresql", "mysql", "sqlite"):
            raise ConfigurationError(
                f"the queue log cannot live in the database of alias {name!r}, which is {wrapper.display_name}: "
                f"use PostgreSQL, MySQL, MariaDB or SQLite"
            )
        if not wrapper.settings_dict["AUTOCOMMIT"]:
            raise ConfigurationError(
                f"DATABASES[{name!r}] has AUTOCOMMIT = False, with which Django does not say when a transaction was committed, so no call can "
                f"be published behind it; take it out"
            )
        self.drivername = _drivername(wrapper)

    @property
    def wrapper(self) -> Any:
        """Django's connection for this thread."""
        return connections[self.name]

    def own(self) -> Engine:
        """Return an engine with connections of its own, made with Django's parameters."""
        engine = self._engine(self.drivername, self._connect, QueuePool)

        def remember(_: Any, record: Any) -> None:
            record.info[_DATABASE] = self._database()

        def follow(_: Any, record: Any, __: Any) -> None:
            if record.info[_DATABASE] != self._database():
                raise DisconnectionError("the alias leads to another database now, as in tests")

        def close(_: Any, record: Any) -> None:
            # Tests drop their database at the end, which an open connection would prevent.
            if in_tests():
                record.invalidate()

        event.listen(engine, "connect", remember)
        event.listen(engine, "checkout", follow)
        event.listen(engine, "checkin", close)
        return engine

    def joined(self) -> Engine:
        """Return an engine on Django's connections, in the transaction that Django has open."""
        return self._of_django(_Theirs())

    def driven(self) -> Engine:
        """Return an engine on Django's connections, whose transactions are blocks of ``transaction.atomic()``."""
        return self._of_django(_Atomic(self))

    def savepoint(self) -> Any:
        """Return a block that sets a savepoint in Django's transaction."""
        return transaction.atomic(using=self.name)

    def in_test_case(self) -> bool:
        """Return whether this thread's connection is in a transaction that a ``TestCase`` rolls back at its end."""
        return in_test_case(self.wrapper)

    def in_test_case_elsewhere(self) -> bool:
        """Return whether another thread's connection is in one, so that this thread cannot see what is written there."""
        return _opened.in_test_case(self.name, but=self.wrapper)

    def refuse_forbidden(self) -> None:
        """Raise what Django, or pytest-django, raises in a test that may not use this database."""
        if in_tests():
            with plainly(), self.wrapper.temporary_connection():
                pass

    def _engine(self, drivername: str, creator: Any, poolclass: Any) -> Engine:
        settings = self.wrapper.settings_dict
        url = URL.create(
            drivername,
            username=settings["USER"] or None,
            host=settings["HOST"] or None,
            port=int(settings["PORT"]) if settings["PORT"] else None,
            database=str(settings["NAME"]),
        )
        return create_engine(url, creator=creator, poolclass=poolclass, pool_reset_on_return=None, hide_parameters=True)

    def _of_django(self, transactions: Transactions) -> Engine:
        def connection() -> Any:
            wrapper = self.wrapper
            with plainly():
                wrapper.ensure_connection()
            return wrapper.connection

        engine = self._engine(shared(self.drivername), connection, NullPool)
        engine.dialect.transactions = transactions  # type: ignore[attr-defined]
        return engine

    def _database(self) -> str:
        return str(self.wrapper.settings_dict["NAME"])

    def _connect(self) -> Any:
        wrapper = self.wrapper
        parameters = wrapper.get_connection_params()
        for name in _OF_ITS_CURSORS:
            parameters.pop(name, None)
        if wrapper.vendor == "mysql":
            parameters["charset"] = "utf8mb4"
        connection = wrapper.Database.connect(**parameters)
        role = wrapper.settings_dict["OPTIONS"].get("assume_role") if wrapper.vendor == "postgresql" else None
        if role:
            connection.cursor().execute(f"SET ROLE {wrapper.ops.quote_name(role)}")
            connection.commit()
        return connection


#: Connection parameters for how Django's cursors convert values to Python's.
_OF_ITS_CURSORS = ("context", "conv", "cursor_factory", "detect_types")


def _drivername(wrapper: Any) -> str:
    """Return SQLAlchemy's name for the database and its driver."""
    match wrapper.vendor, wrapper.Database.__name__:
        case "postgresql", "psycopg":
            return "postgresql+psycopg"
        case "postgresql", _:
            return "postgresql+psycopg2"
        case "mysql", "pymysql":  # in place of MySQLdb, after pymysql.install_as_MySQLdb()
            return "mysql+pymysql"
        case "mysql", _:
            return "mysql+mysqldb"
        case _:
            return "sqlite+pysqlite"


def in_test_case(wrapper: Any) -> bool:
    """Return whether Django's connection is in a transaction that a ``TestCase`` rolls back at its end."""
    return any(map(is_of_test_case, wrapper.atomic_blocks))


def is_of_test_case(block: Any) -> bool:
    """Return whether a ``TestCase`` opened this block of ``transaction.atomic()``."""
    return bool(getattr(block, "_from_testcase", False))


def in_tests() -> bool:
    """Return whether Django's test environment is set up, which gives ``mail`` an outbox."""
    return hasattr(mail, "outbox")


class _Opened:
    """Django's connections of all threads, in tests. Django itself shows each thread only its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wrappers: WeakSet[Any] = WeakSet()

    def add(self, connection: Any, **_: Any) -> None:
        if in_tests():
            with self._lock:
                self._wrappers.add(connection)

    def in_test_case(self, alias: str, *, but: Any) -> bool:
        with self._lock:
            return any(
                in_test_case(wrapper) for wrapper in self._wrappers if wrapper.alias == alias and wrapper is not but
            )


_opened = _Opened()
connection_created.connect(_opened.add)


@contextmanager
def plainly() -> Iterator[None]:
    """Raise the driver's own errors instead of Django's."""
    try:
        yield
    except Error as error:
        raise (error.__cause__ or error) from None


class _Theirs:
    """Leave the transaction to Django: do nothing."""

    def begin(self) -> None:
        pass

    commit = roll_back = break_off = begin


class _Atomic:
    """Make each transaction a block of ``transaction.atomic()``."""

    def __init__(self, alias: Alias) -> None:
        self._alias = alias

    def begin(self) -> None:
        block = transaction.atomic(using=self._alias.name)
        block.celery_idempotent = None  # what to call at its end
        with plainly():
            block.__enter__()

    def commit(self) -> None:
        wrapper, block = self._innermost()
        if block is None:
            raise transaction.TransactionManagementError("the transaction of this atomic body is over")
        # A failing hook of the user's must not look like a failed commit.
        wrapper.run_on_commit = [(ids, hook, True) for ids, hook, _ in wrapper.run_on_commit]
        self._leave(block)

    def roll_back(self) -> None:
        wrapper, block = self._innermost()
        if block is not None:
            wrapper.needs_rollback = True
            self._leave(block)

    def break_off(self) -> None:
        wrapper, block = self._innermost()
        if block is not None:
            wrapper.close()
            self._leave(block)

    @staticmethod
    def _leave(block: Any) -> None:
        if block.celery_idempotent is not None:
            block.celery_idempotent()
        with plainly():
            block.__exit__(None, None, None)

    def _innermost(self) -> tuple[Any, Any]:
        wrapper = self._alias.wrapper
        for block in reversed(wrapper.atomic_blocks):
            if hasattr(block, "celery_idempotent"):
                return wrapper, block
            # A block that the body did not leave, such as one in a generator.
        return wrapper, None
