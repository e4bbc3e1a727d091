"""Connections to servers: kept per process, and one round trip for however many calls."""

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
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from celery_idempotent.stores.redis.rows import Argument
from celery_idempotent.stores.redis.scripts import Script

__all__ = [
    "THE_SERVER",
    "Call",
    "NoConnectionError",
    "Opened",
    "Place",
    "Wire",
    "Wires",
    "ask",
    "exchange",
    "load",
    "read_replies",
]


class Wire(Protocol):
    """A connection of redis-py's: what of it is used here, with its types."""

    def connect(self) -> None: ...

    def disconnect(self) -> None: ...

    def can_read(self) -> bool: ...

    def send_packed_command(self, packed: list[bytes], *, check_health: bool) -> None: ...

    def read_response(self) -> Any: ...


#: How a server before 7.0 words the refusal of a command that a script gave, and the refusals that redis-py knows by their codes.
_WRAPPED = re.compile(
    r"(?:ERR )?Error running script \(call to \w+\): @user_script:\d+: @user_script: \d+: -([A-Z]+) (.*)", re.DOTALL
)
_KNOWN: Mapping[str, type[ResponseError]] = {
    "CLUSTERDOWN": ClusterDownError,
    "MASTERDOWN": MasterDownError,
    "OOM": OutOfMemoryError,
    "READONLY": ReadOnlyError,
    "TRYAGAIN": TryAgainError,
}

#: Seconds between two looks whether it is an operation's turn.
_LOOK_EVERY = 0.002

#: A server's host and port.
Place = tuple[str, int]

#: The place of a server that is the only one, wherever it may be at the moment.
THE_SERVER: Place = ("", 0)


class NoConnectionError(Exception):
    """There is no way to a server; nothing was sent."""


@dataclass(frozen=True, slots=True)
class Call:
    """A script for messages of some shards.

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
        """As it is sent to a server that knows the script."""
        return (b"EVALSHA", self.script.digest, len(self.tags), *self.tags, *self.arguments)


@dataclass(slots=True, eq=False)
class Opened:
    """What one process has opened.

    Attributes:
        idle: Connections that nobody uses just now.
        ready: Whether the layout was looked at.
        slots: Of a cluster, where each shard is; empty until that was asked for.
    """

    idle: dict[Place, list[Wire]] = field(default_factory=dict)
    ready: bool = False
    slots: list[Place] = field(default_factory=list)
    _closed: bool = False
    #: The operations under way. They are referred to weakly: one that a signal broke off between two lines is not counted for ever.
    _busy: WeakSet[Wires] = field(default_factory=WeakSet)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, wires: Wires, *, at_once: int, patience: float) -> None:
        """Wait for an operation's turn.

        Args:
            wires: The operation's.
            at_once: How many there may be.
            patience: Seconds.

        Raises:
            NoConnectionError: Its turn did not come.
        """
        deadline = time.monotonic() + patience
        while True:
            with self._lock:
                if len(self._busy) < at_once:
                    self._busy.add(wires)
                    return
            if time.monotonic() > deadline:
                raise NoConnectionError(
                    f"all {at_once} connections of this process were in use for {patience:g} s; "
                    f"let the store's URL allow more by max_connections=..."
                )
            time.sleep(_LOOK_EVERY)

    def end(self, wires: Wires) -> None:
        """End the operation."""
        with self._lock:
            self._busy.discard(wires)

    def take(self, place: Place) -> Wire | None:
        """Return a connection that nobody uses, and that its server has not closed."""
        idle = self.idle.get(place)
        while idle:
            try:
                wire = idle.pop()
            except IndexError:
                return None  # another thread has it
            try:
                # One that has something to say, where nothing was asked, has been closed by the server.
                if not wire.can_read():
                    return wire
            except (RedisError, OSError):
                pass
            wire.disconnect()
        return None

    def give_back(self, place: Place, wire: Wire) -> None:
        """Keep a connection for others."""
        if self._closed:
            wire.disconnect()
        else:
            self.idle.setdefault(place, []).append(wire)

    def close(self) -> None:
        """Close what nobody uses; the rest as it is given back."""
        self._closed = True
        for idle in self.idle.values():
            while idle:
                idle.pop().disconnect()


class Wires:
    """The connections that one operation uses.

    Args:
        opened: Where they are taken from, and given back to.
        connect: Makes a new one.
    """

    def __init__(self, opened: Opened, connect: Callable[[Place], Wire]) -> None:
        self.opened = opened
        self._connect = connect
        self._taken: dict[Place, Wire] = {}

    def to(self, place: Place) -> Wire:
        """Return the connection to a server.

        Raises:
            NoConnectionError: There is none.
        """
        wire = self._taken.get(place)
        if wire is None:
            wire = self.opened.take(place)
            if wire is None:
                try:
                    wire = self._connect(place)
                except (RedisError, OSError) as error:
                    raise NoConnectionError(str(error)) from error
            self._taken[place] = wire
        return wire

    def give_back(self) -> None:
        """They may be used by others."""
        for place, wire in self._taken.items():
            self.opened.give_back(place, wire)
        self.opened.end(self)

    def disconnect(self) -> None:
        """They may be in the midst of something."""
        for wire in self._taken.values():
            wire.disconnect()
        self.opened.end(self)


def exchange(wire: Wire, calls: Sequence[Call], *, at_one_moment: bool = False) -> list[Any]:
    """Make calls in one go, and read their answers; a refusal is an answer too.

    Raises:
        redis.exceptions.ConnectionError: The connection broke.
        redis.exceptions.TimeoutError: There was no answer in time.
    """
    commands: list[Sequence[Argument]] = [call.command for call in calls]
    if not at_one_moment:
        ask(wire, commands)
        return read_replies(wire, len(commands))
    ask(wire, [(b"MULTI",), *commands, (b"EXEC",)])
    *queued, done = read_replies(wire, len(commands) + 2)
    if isinstance(done, Exception):
        raise next((answer for answer in queued if isinstance(answer, Exception)), done)
    return list(done)


def load(wire: Wire, scripts: Sequence[Script]) -> None:
    """Tell a server some scripts."""
    commands = [(b"SCRIPT", b"LOAD", script.text) for script in dict.fromkeys(scripts)]
    ask(wire, commands)
    for answer in read_replies(wire, len(commands)):
        if isinstance(answer, Exception):
            raise answer


def ask(wire: Wire, commands: Sequence[Sequence[Argument]]) -> None:
    """Send commands in one go."""
    wire.send_packed_command([_packed(command) for command in commands], check_health=False)


def _packed(command: Sequence[Argument]) -> bytes:
    """Return a command as it travels: redis-py's own way is for arguments of any type, and takes a quarter of a verb's processor time."""
    arguments = [argument if isinstance(argument, bytes) else b"%d" % argument for argument in command]
    return b"*%d\r\n" % len(command) + b"".join([b"$%d\r\n%b\r\n" % (len(data), data) for data in arguments])


def read_replies(wire: Wire, number: int) -> list[Any]:
    """Read so many answers; a refusal is an answer too."""
    return [_hear_one(wire) for _ in range(number)]


def _hear_one(wire: Wire) -> Any:
    try:
        return wire.read_response()
    except ResponseError as error:
        return _unwrapped(error)


def _unwrapped(error: ResponseError) -> ResponseError:
    """Return a refusal as the server means it: before 7.0 it wraps that of a command in a script into one of the script."""
    wrapped = _WRAPPED.match(str(error))
    if wrapped is None:
        return error
    code, text = wrapped.groups()
    # As redis-py gives them: those that it knows are types, without the code.
    return _KNOWN[code](text) if code in _KNOWN else ResponseError(f"{code} {text}")
