"""Call scripts for one operation, in one round trip to each server that has a shard of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

from redis.exceptions import AskError, MovedError, NoScriptError

from celery_idempotent.stores.redis.layout import Layout
from celery_idempotent.stores.redis.pool import (
    THE_SERVER,
    Call,
    CheckedOut,
    Connection,
    ConnectionPool,
    NoConnectionError,
    Place,
    ask,
    read_replies,
)
from celery_idempotent.stores.redis.rows import Argument
from celery_idempotent.stores.redis.scripts import Script

__all__ = ["ScriptSession"]

#: Messages for one script, at most: a server does nothing else while it runs.
_MESSAGES_AT_ONCE = 100

#: Repeats of calls that a server did not run, because it did not know the script or no longer has the slot.
_ROUNDS = 4
_NOT_RUN = (MovedError, NoScriptError)

_MULTI, _EXEC = (b"MULTI",), (b"EXEC",)


class _Servers(Protocol):
    """The servers that have the shards, as a session needs them."""

    #: Whether one server has all shards.
    whole: bool

    def place_of(self, tag: bytes, pool: ConnectionPool) -> Place:
        """Return the server that has a shard."""


class ScriptSession:
    """Call scripts for one operation.

    Args:
        server: Where the scripts run.
        layout: The keys of the log.
        connections: The operation's connections.
        is_retry: Whether an earlier attempt at the operation broke off with its connection: it may have taken effect.
    """

    def __init__(self, server: _Servers, layout: Layout, connections: CheckedOut, *, is_retry: bool) -> None:
        self.layout = layout
        self.is_retry = is_retry
        #: Whether one server has all shards, and one clock.
        self.whole = server.whole
        #: Whether some calls of a round trip took effect although another was refused.
        self.partly = False
        self._server = server
        self._connections = connections

    def call(self, script: Script, ident: bytes, *arguments: Argument) -> Any:
        """Call a script for one message."""
        (answer,) = self.send((Call(script, (self.layout.tag(ident),), arguments),))
        return answer

    def call_all(
        self, script: Script, common: Sequence[Argument], items: Sequence[tuple[bytes, Sequence[Argument]]]
    ) -> list[Any]:
        """Call a script that takes many messages; return an answer for each, in their order.

        Args:
            script: Answers with a list.
            common: The first arguments.
            items: The identity and the arguments of each message.
        """
        places = self._in_calls([self.layout.shard(ident) for ident, _ in items])
        calls = [
            Call(
                script,
                [self.layout.tag(items[place][0]) for place in some],
                [*common, *(argument for place in some for argument in items[place][1])],
            )
            for some in places
        ]
        answers: list[Any] = [None] * len(items)
        for some, answered in zip(places, self.send(calls), strict=True):
            for place, answer in zip(some, answered, strict=True):
                answers[place] = answer
        return answers

    def call_each(self, script: Script, arguments: Sequence[tuple[int, Sequence[Argument]]]) -> list[Any]:
        """Call a script for some shards with arguments for each; return their answers, from one moment if one server has them all."""
        calls = [Call(script, (self.layout.tags[shard],), some) for shard, some in arguments]
        return self.send(calls, at_one_moment=self.whole and len(calls) > 1)

    def command_each(self, commands: Sequence[Sequence[Argument]]) -> dict[str, list[Any]]:
        """Send commands to every server in one round trip; return what each answers, by its name. A refusal is an answer too."""
        places = dict.fromkeys(self._server.place_of(tag, self._connections.pool) for tag in self.layout.tags)
        connections = {place: self._connections.to(place) for place in places}
        for connection in connections.values():
            ask(connection, commands)
        return {
            f"{host}:{port}": read_replies(connection, len(commands))
            for (host, port), connection in connections.items()
        }

    def send(self, calls: Sequence[Call], *, at_one_moment: bool = False) -> list[Any]:
        """Make calls in one round trip; return their answers.

        Args:
            calls: The calls, in this order.
            at_one_moment: Whether no other call may come between them. Only if one server has all shards.
        """
        answers = self._exchange(calls, at_one_moment)
        rounds = _ROUNDS
        while refused := {place: answer for place, answer in enumerate(answers) if isinstance(answer, Exception)}:
            left = [place for place, refusal in refused.items() if isinstance(refusal, _NOT_RUN)]
            if not left or not rounds:
                self.partly = len(refused) < len(answers)
                if any(isinstance(refusal, AskError) for refusal in refused.values()):
                    raise NoConnectionError("a part of it is being moved to another node")
                raise next(iter(refused.values()))
            rounds -= 1
            if any(isinstance(refused[place], MovedError) for place in left):
                self._connections.pool.slots = {}
            self._load([calls[place] for place in left if isinstance(refused[place], NoScriptError)])
            repeated = self._exchange([calls[place] for place in left], at_one_moment)
            for place, answer in zip(left, repeated, strict=True):
                answers[place] = answer
        return answers

    def _exchange(self, calls: Sequence[Call], at_one_moment: bool) -> list[Any]:
        """Send calls to the servers of their shards, and read the answers. A refusal is an answer too."""
        if self.whole:
            connection = self._connections.to(THE_SERVER)
            commands = [call.command for call in calls]
            if not at_one_moment:
                ask(connection, commands)
                return read_replies(connection, len(commands))
            ask(connection, [_MULTI, *commands, _EXEC])
            return _read_transaction(connection, len(commands))
        by_connection: dict[Connection, list[int]] = defaultdict(list)
        for place, call in enumerate(calls):
            by_connection[self._connection_of(call)].append(place)
        for connection, places in by_connection.items():
            ask(connection, [calls[place].command for place in places])
        answers: list[Any] = [None] * len(calls)
        for connection, places in by_connection.items():
            for place, reply in zip(places, read_replies(connection, len(places)), strict=True):
                answers[place] = reply
        return answers

    def _load(self, calls: Sequence[Call]) -> None:
        """Load scripts into servers that do not know them: they are new, or were restarted."""
        scripts = dict.fromkeys((self._connection_of(call), call.script) for call in calls)
        for connection, script in scripts:
            ask(connection, [(b"SCRIPT", b"LOAD", script.text)])
        answers = [answer for connection, _ in scripts for answer in read_replies(connection, 1)]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer

    def _connection_of(self, call: Call) -> Connection:
        return self._connections.to(self._server.place_of(call.tags[0], self._connections.pool))

    def _in_calls(self, shards: Sequence[int]) -> list[Sequence[int]]:
        """Divide messages into calls; return each call's places in the list. In a cluster, a call is for one shard."""
        of_shard: dict[int, list[int]] = defaultdict(list)
        for place, shard in enumerate(shards):
            of_shard[0 if self.whole else shard].append(place)
        return [
            some[first : first + _MESSAGES_AT_ONCE]
            for some in of_shard.values()
            for first in range(0, len(some), _MESSAGES_AT_ONCE)
        ]


def _read_transaction(connection: Connection, number: int) -> list[Any]:
    """Read the answers to a transaction.

    Raises:
        redis.exceptions.ResponseError: It was refused as a whole.
    """
    *queued, done = read_replies(connection, number + 2)
    if isinstance(done, Exception):
        raise next((answer for answer in queued if isinstance(answer, Exception)), done)
    return list(done)
