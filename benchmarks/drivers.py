"""Drivers: what a store hands to its driver, recorded; and the same sent again by the driver alone.

Recorded is what the driver is called with, beneath everything that a store may put on top of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast
from unittest.mock import patch

import sqlalchemy as sa

from celery_idempotent.core.store import TransactionalStore

__all__ = ["Driver", "Statement", "driver_of"]

#: The arguments of the driver's method that sends a statement.
Statement = tuple[tuple[Any, ...], dict[str, Any]]

Send = Callable[[Statement], object]


class Driver(ABC):
    """A driver."""

    @contextmanager
    def recording(self) -> Iterator[list[Statement]]:
        """Record what it is called with, on connections that are opened meanwhile."""
        statements: list[Statement] = []
        with self._listening(statements):
            yield statements

    @abstractmethod
    def _listening(self, statements: list[Statement]) -> Any:
        """Return a context in which calls are noted."""

    @abstractmethod
    def connect(self, store: Any, url: str) -> AbstractContextManager[Send]:
        """Keep a connection as the store's are open; what sends a statement on it and reads the answer."""


def _noting(method: Callable[..., Any], statements: list[Statement]) -> Callable[..., Any]:
    def noting(self: Any, *args: Any, **options: Any) -> Any:
        statements.append((args, options))
        return method(self, *args, **options)

    return noting


def _kept(store: Any) -> Any:
    """Return a connection of the store's, with all that it is told when it is opened, for nobody else."""
    connection = cast("TransactionalStore", store).engine.raw_connection()
    driver = connection.driver_connection
    connection.detach()
    return driver


class _Psycopg(Driver):
    def _listening(self, statements: list[Statement]) -> Any:
        from psycopg import Cursor

        return patch.object(Cursor, "execute", _noting(Cursor.execute, statements))

    @contextmanager
    def connect(self, store: Any, url: str) -> Iterator[Send]:
        connection = _kept(store)
        connection.autocommit = True

        def send(statement: Statement) -> object:
            args, options = statement
            cursor = connection.execute(*args, **options)
            return cursor.fetchall() if cursor.description else cursor.rowcount

        yield send
        connection.close()


class _PyMySQL(Driver):
    def _listening(self, statements: list[Statement]) -> Any:
        from pymysql.cursors import Cursor

        return patch.object(Cursor, "execute", _noting(Cursor.execute, statements))

    @contextmanager
    def connect(self, store: Any, url: str) -> Iterator[Send]:
        connection = _kept(store)
        connection.autocommit(True)

        def send(statement: Statement) -> object:
            args, options = statement
            with connection.cursor() as cursor:
                cursor.execute(*args, **options)
                return cursor.fetchall() if cursor.description else cursor.rowcount

        yield send
        connection.close()


class _SQLite3(Driver):
    def _listening(self, statements: list[Statement]) -> Any:
        import sqlite3
        from sqlite3 import dbapi2

        class Cursor(sqlite3.Cursor):
            execute = _noting(sqlite3.Cursor.execute, statements)

        class Connection(sqlite3.Connection):
            execute = _noting(sqlite3.Connection.execute, statements)

            def cursor(self, factory: Any = Cursor) -> Any:
                return super().cursor(factory)

        connect: Any = dbapi2.connect
        return patch.object(dbapi2, "connect", lambda *args, **options: connect(*args, factory=Connection, **options))

    @contextmanager
    def connect(self, store: Any, url: str) -> Iterator[Send]:
        connection = _kept(store)
        connection.isolation_level = None

        def send(statement: Statement) -> object:
            args, options = statement
            cursor = connection.execute(*args, **options)
            answer = cursor.fetchall() if cursor.description else cursor.rowcount
            cursor.close()
            return answer

        yield send
        connection.close()


class _RedisPy(Driver):
    def _listening(self, statements: list[Statement]) -> Any:
        from redis.connection import AbstractConnection

        send: Any = AbstractConnection.send_packed_command

        def noting(self: Any, command: Any, *args: Any, **options: Any) -> Any:
            packed = b"".join(command) if isinstance(command, list) else command
            statements.extend(((parts,), {}) for parts in _commands(packed))
            return send(self, command, *args, **options)

        return patch.object(AbstractConnection, "send_packed_command", noting)

    @contextmanager
    def connect(self, store: Any, url: str) -> Iterator[Send]:
        from redis import ConnectionPool

        pool: Any = ConnectionPool.from_url(url)
        connection = pool.get_connection()

        def send(statement: Statement) -> object:
            ((command,), _) = statement
            connection.send_command(*command, check_health=False)
            return connection.read_response()

        yield send
        connection.disconnect()


def _commands(packed: bytes) -> Iterator[tuple[bytes, ...]]:
    """Take a request apart: of each command its name and arguments."""
    position = 0

    def number(kind: bytes) -> int:
        nonlocal position
        end = packed.index(b"\r\n", position)
        assert packed[position : position + 1] == kind, packed[position:end]
        value = int(packed[position + 1 : end])
        position = end + 2
        return value

    while position < len(packed):
        parts: list[bytes] = []
        for _ in range(number(b"*")):
            length = number(b"$")
            parts.append(packed[position : position + length])
            position += length + 2
        yield tuple(parts)


def driver_of(url: str) -> Driver:
    """Return the driver by which a store of this URL speaks to its server."""
    drivers: Mapping[str, Callable[[], Driver]] = {
        "postgresql": _Psycopg,
        "mysql": _PyMySQL,
        "mariadb": _PyMySQL,
        "sqlite": _SQLite3,
        "redis": _RedisPy,
    }
    return drivers[sa.make_url(url).get_backend_name()]()
