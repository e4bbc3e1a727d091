"""The connections of a process, and what is sent on them.

A connection is redis-py's. Its pool, its packer and its client are not used on the way of a verb, of which each takes more than a tenth: see ADR 22.
"""

# ruff: noqa: D102 - of redis-py's connection

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from celery_idempotent.errors import IdempotentError
from celery_idempotent.stores.redis.rows import Argument
from celery_idempotent.stores.redis.scripts import Script

__all__ = [
    "THE_SERVER",
    "Call",
    "CheckedOut",
    "Connection",
    "ConnectionPool",
    "NoAdmissionError",
    "NoConnectionError",
    "Place",
    "ask",
    "read_replies",
]


class Connection(Protocol):
    """The part of redis-py's connection that is used here, with types."""

    def connect(self) -> None: ...

    def disconnect(self) -> None: ...

    def can_read(self) -> bool: ...

    def send_packed_command(self, packed: list[bytes], *, check_health: bool) -> None: ...

    def read_response(self) -> Any: ...


#: Before 7.0, a server wraps the refusal of a script's command in a text of its own.
_WRAPPED = re.compile(
    r"(?:ERR )?Error running script \(call to \w+\): @user_script:\d+: @user_script: \d+: -([A-Z]+) (.*)", re.DOTALL
)
#: The types of refusals, by their codes. redis-py before 6 knows those of a cluster only in its own client for clusters.
_TYPES: Mapping[str, type[ResponseError]] = {
    "ASK": AskError,
    "CLUSTERDOWN": ClusterDownError,
    "MASTERDOWN": MasterDownError,
    "MOVED": MovedError,
    "OOM": OutOfMemoryError,
    "READONLY": ReadOnlyError,
    "TRYAGAIN": TryAgainError,
}

#: An operation that waits for its turn looks every so many seconds.
_LOOK_EVERY = 0.002

#: A server's host and port.
Place = tuple[str, int]

#: The place of the only server, wherever it is at the moment.
THE_SERVER: Place = ("", 0)


class NoConnectionError(Exception):
    """No server could be reached. Nothing was sent."""


#: After these errors, connections have no unread answer.
_READ_TO_THE_END = (NoConnectionError, IdempotentError, ResponseError)


class NoAdmissionError(NoConnectionError):
    """The server is there, and does not let this account in, or has no such database."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a script, for messages of some shards.

    Attributes:
        script: The script.
        tags: The hash tag of each message's shard.
        arguments: The script's arguments.
    """

    script: Script
    tags: Sequence[bytes]
    arguments: Sequence[Argument]

    @property
    def command(self) -> tuple[Argument, ...]:
        """The command for a server that knows the script."""
        return (b"EVALSHA", self.script.digest, len(self.tags), *self.tags, *self.arguments)


@dataclass(slots=True, eq=False)
class ConnectionPool:
    """The connections that one process has opened.

    Attributes:
        idle: Those that are not in use.
        ready: Whether the layout was checked.
        slots: The node of each shard in a cluster; empty until a node was asked.
        busy: The operations under way. References are weak: one that a signal broke off between two lines is not counted for ever.
        lock: Held to change ``busy``.
    """

    idle: dict[Place, list[Connection]] = field(default_factory=dict)
    ready: bool = False
    slots: dict[bytes, Place] = field(default_factory=dict)
    busy: WeakSet[CheckedOut] = field(default_factory=WeakSet)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False

    def take(self, place: Place) -> Connection | None:
        """Return an idle connection that its server has not closed."""
        while (connection := self._pop(place)) is not None:
            try:
                # Nothing was asked, so if there is something to read, the server has closed it.
                if not connection.can_read():
                    return connection
            except (RedisError, OSError):
                pass
            connection.disconnect()
        return None

    def give_back(self, place: Place, connection: Connection) -> None:
        """Keep a connection for others."""
        if self._closed:
            connection.disconnect()
        else:
            self.idle.setdefault(place, []).append(connection)

    def close(self) -> None:
        """Close the idle connections; each of the others is closed when it is given back."""
        self._closed = True
        for place in list(self.idle):
            while (connection := self._pop(place)) is not None:
                connection.disconnect()

    def _pop(self, place: Place) -> Connection | None:
        try:
            return self.idle[place].pop()
        except LookupError:
            return None  # there is none, or another thread has it


class CheckedOut:
    """The connections that one operation uses, from its turn to its end: use as a context manager.

    Args:
        pool: Where they are taken from, and given back to.
        connect: Makes a new one.
        at_once: How many operations may run at once in this process.
        patience: Seconds to wait for the operation's turn.
    """

    def __init__(
        self, pool: ConnectionPool, connect: Callable[[Place], Connection], *, at_once: int, patience: float
    ) -> None:
        self.pool = pool
        self._connect = connect
        self._at_once = at_once
        self._patience = patience
        self._taken: dict[Place, Connection] = {}

    def __enter__(self) -> None:
        """Wait for the operation's turn.

        Raises:
            NoConnectionError: It did not come in time.
        """
        deadline = time.monotonic() + self._patience
        while True:
            with self.pool.lock:
                if len(self.pool.busy) < self._at_once:
                    self.pool.busy.add(self)
                    return
            if time.monotonic() > deadline:
                raise NoConnectionError(
                    f"all {self._at_once} connections of this process were in use for {self._patience:g} s; "
                    f"let the store's URL allow more by max_connections=..."
                )
            time.sleep(_LOOK_EVERY)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Give the connections back, or close those that may have an unread answer.

        A signal, such as Celery's soft time limit, may strike in the middle of an answer. The next operation would read the rest of it.
        """
        # A replica is closed too: it is no place to write.
        whole = error is None or (isinstance(error, _READ_TO_THE_END) and not isinstance(error, ReadOnlyError))
        for place, connection in self._taken.items():
            if whole:
                self.pool.give_back(place, connection)
            else:
                connection.disconnect()
        with self.pool.lock:
            self.pool.busy.discard(self)

    def to(self, place: Place) -> Connection:
        """Return the connection to a server.

        Raises:
            NoConnectionError: The server cannot be reached.
        """
        connection = self._taken.get(place)
        if connection is None:
            try:
                connection = self.pool.take(place) or self._connect(place)
            except (AuthenticationError, ResponseError) as error:
                raise NoAdmissionError(str(error)) from error
            except (RedisError, OSError) as error:
                raise NoConnectionError(str(error)) from error
            self._taken[place] = connection
        return connection


def ask(connection: Connection, commands: Sequence[Sequence[Argument]]) -> None:
    """Send commands together."""
    connection.send_packed_command([_packed(command) for command in commands], check_health=False)


def _packed(command: Sequence[Argument]) -> bytes:
    """Return a command as the protocol has it. redis-py's packer takes arguments of any type, and for that more time."""
    arguments = [argument if isinstance(argument, bytes) else b"%d" % argument for argument in command]
    return b"*%d\r\n" % len(command) + b"".join([b"$%d\r\n%b\r\n" % (len(data), data) for data in arguments])


def read_replies(connection: Connection, number: int) -> list[Any]:
    """Read so many answers. A refusal is returned like any other answer.

    Raises:
        redis.exceptions.ConnectionError: The connection broke.
        redis.exceptions.TimeoutError: There was no answer in time.
    """
    return [_read_reply(connection) for _ in range(number)]


def _read_reply(connection: Connection) -> Any:
    try:
        return connection.read_response()
    except ResponseError as error:
        return _typed(error)


def _typed(error: ResponseError) -> ResponseError:
    """Return a refusal as redis-py 6 types it and a server since 7.0 words it."""
    if type(error) is not ResponseError:
        return error
    text = str(error)
    if wrapped := _WRAPPED.match(text):
        text = " ".join(wrapped.groups())
    # A refusal that has a type loses its code.
    code, _, rest = text.partition(" ")
    return _TYPES[code](rest) if code in _TYPES else ResponseError(text)
