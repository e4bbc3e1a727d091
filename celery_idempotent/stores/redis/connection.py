"""Run operations on a server: one round trip per call, and what to do if there is no answer.

An idle connection that the server has closed is noticed at its socket, without a round trip. If a connection breaks during an operation, the
operation is repeated once on a new one. Its first attempt may have taken effect, so the session tells the operation (``is_retry``).
No answer is waited for longer than :data:`ANSWER`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,  # noqa: A004 - redis-py's name
    MasterDownError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,  # noqa: A004 - redis-py's name
    TryAgainError,
)

from celery_idempotent.errors import AccessDeniedError, StoreError
from celery_idempotent.stores.faults import unavailable
from celery_idempotent.stores.redis.address import Address
from celery_idempotent.stores.redis.layout import Layout
from celery_idempotent.stores.redis.pool import (
    THE_SERVER,
    Call,
    NoAdmissionError,
    NoConnectionError,
    Opened,
    Place,
    Wire,
    Wires,
    ask,
    read_replies,
)
from celery_idempotent.stores.redis.rows import Argument
from celery_idempotent.stores.redis.scripts import Script

__all__ = ["AT_ONCE", "ScriptSession", "Server", "connect"]

T = TypeVar("T")

#: Seconds to wait for an answer: far more than one takes, and less than a broker waits for a heartbeat.
ANSWER = 20.0

#: Seconds to wait until a server accepts a connection.
CONNECT = 10.0

#: Messages for one script, at most: a server does nothing else while it runs.
AT_ONCE = 100

#: Refusals that pass, and after which nothing was done: no memory, no disk, someone's script that runs for too long, a failover.
_PASSING = (OutOfMemoryError, MasterDownError, ClusterDownError, TryAgainError)
_PASSING_TEXTS = ("MISCONF", "BUSY ", "NOREPLICAS", "UNKILLABLE")

#: Repeats of calls that a server did not run, because it did not know the script or no longer has the slot.
_ROUNDS = 4
_NOT_RUN = (MovedError, NoScriptError)

_MULTI, _EXEC = (b"MULTI",), (b"EXEC",)


class ScriptSession:
    """Call scripts for one operation.

    Args:
        server: Where the scripts run.
        layout: The keys of the log.
        wires: The operation's connections.
        is_retry: Whether an earlier attempt at the operation broke off with its connection: it may have taken effect.
    """

    def __init__(self, server: Server, layout: Layout, wires: Wires, *, is_retry: bool) -> None:
        self.layout = layout
        self.is_retry = is_retry
        #: Whether one server has all shards, and one clock.
        self.whole = server.whole
        #: Whether calls took effect that were made together with one that was refused.
        self.partly = False
        self._server = server
        self._wires = wires

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
        """Call a script for some shards with arguments for each; return their answers, all of one moment if one server has them."""
        calls = [Call(script, (self.layout.tags[shard],), some) for shard, some in arguments]
        return self.send(calls, at_one_moment=self.whole and len(calls) > 1)

    def command_each(self, commands: Sequence[Sequence[Argument]]) -> dict[str, list[Any]]:
        """Send commands to every server in one round trip; return what each answers, by its name. A refusal is an answer too."""
        places = dict.fromkeys(self._server.place_of(tag, self._wires.opened) for tag in self.layout.tags)
        wires = {place: self._wires.to(place) for place in places}
        for wire in wires.values():
            ask(wire, commands)
        return {f"{host}:{port}": read_replies(wire, len(commands)) for (host, port), wire in wires.items()}

    def send(self, calls: Sequence[Call], *, at_one_moment: bool = False) -> list[Any]:
        """Make calls in one round trip; return their answers.

        Args:
            calls: In this order.
            at_one_moment: Whether no one else's may come between them. Only where one server has all shards.
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
                self._wires.opened.slots = {}
            self._load([calls[place] for place in left if isinstance(refused[place], NoScriptError)])
            repeated = self._exchange([calls[place] for place in left], at_one_moment)
            for place, answer in zip(left, repeated, strict=True):
                answers[place] = answer
        return answers

    def _exchange(self, calls: Sequence[Call], at_one_moment: bool) -> list[Any]:
        """Send calls to the servers of their shards, and read the answers. A refusal is an answer too."""
        if self.whole:
            wire = self._wires.to(THE_SERVER)
            commands = [call.command for call in calls]
            if not at_one_moment:
                ask(wire, commands)
                return read_replies(wire, len(commands))
            ask(wire, [_MULTI, *commands, _EXEC])
            return _read_transaction(wire, len(commands))
        by_wire: dict[Wire, list[int]] = defaultdict(list)
        for place, call in enumerate(calls):
            by_wire[self._wire_of(call)].append(place)
        for wire, places in by_wire.items():
            ask(wire, [calls[place].command for place in places])
        answers: list[Any] = [None] * len(calls)
        for wire, places in by_wire.items():
            for place, reply in zip(places, read_replies(wire, len(places)), strict=True):
                answers[place] = reply
        return answers

    def _load(self, calls: Sequence[Call]) -> None:
        """Load scripts into servers that do not know them: they are new, or were restarted."""
        scripts = dict.fromkeys((self._wire_of(call), call.script) for call in calls)
        for wire, script in scripts:
            ask(wire, [(b"SCRIPT", b"LOAD", script.text)])
        answers = [answer for wire, _ in scripts for answer in read_replies(wire, 1)]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer

    def _wire_of(self, call: Call) -> Wire:
        return self._wires.to(self._server.place_of(call.tags[0], self._wires.opened))

    def _in_calls(self, shards: Sequence[int]) -> list[Sequence[int]]:
        """Divide messages into calls; return each call's places in the list. In a cluster, a call is for one shard."""
        of_shard: dict[int, list[int]] = defaultdict(list)
        for place, shard in enumerate(shards):
            of_shard[0 if self.whole else shard].append(place)
        return [some[first : first + AT_ONCE] for some in of_shard.values() for first in range(0, len(some), AT_ONCE)]


def _read_transaction(wire: Wire, number: int) -> list[Any]:
    """Read the answers to a transaction of so many commands.

    Raises:
        redis.exceptions.ResponseError: It was refused as a whole.
    """
    *queued, done = read_replies(wire, number + 2)
    if isinstance(done, Exception):
        raise next((answer for answer in queued if isinstance(answer, Exception)), done)
    return list(done)


class Server:
    """A server that has all shards. A fork never leaves a lock of it locked.

    Args:
        address: Where it is.
        layout: The keys of the log.
        prepare: Called in each process before the first operation, until it succeeds.
    """

    #: Whether one server has all shards.
    whole = True

    def __init__(self, address: Address, layout: Layout, prepare: Callable[[ScriptSession], object]) -> None:
        self._address = address
        self._layout = layout
        self._prepare = prepare
        # By process id. After a fork, the child keeps a reference to what the parent opened: otherwise, the garbage collector would
        # close the parent's connections.
        self._opened: dict[int, Opened] = {}

    def __str__(self) -> str:
        return self._address.text

    def run(self, operation: Callable[[ScriptSession], T], *, prepared: bool = True) -> T:
        """Run an operation on a connection, repeating it once if that breaks.

        Args:
            operation: Given a session.
            prepared: Whether the layout must be checked first; ``False`` for operations that do it themselves.

        Raises:
            StoreUnavailableError: No connection, or it broke twice, or no answer, or a refusal that passes.
            StoreError: Any other refusal; a repeat would not change it.
        """
        is_retry = demoted = False
        while True:
            # ``setdefault`` is atomic.
            opened = self._opened.get(os.getpid()) or self._opened.setdefault(os.getpid(), Opened())
            wires = Wires(opened, self._connect, at_once=self._address.at_once, patience=CONNECT)
            on = ScriptSession(self, self._layout, wires, is_retry=is_retry)
            try:
                with wires:
                    if prepared and not opened.ready:
                        self._prepare(on)
                        opened.ready = True
                    return operation(on)
            except (NoAdmissionError, AuthenticationError) as error:
                raise unavailable(
                    f"the queue log at {self} refused: {error}", sent=is_retry or on.partly, kind=AccessDeniedError
                ) from error
            except NoConnectionError as error:
                opened.slots = {}
                raise unavailable(
                    f"the queue log at {self} cannot be reached: {error}", sent=is_retry or on.partly
                ) from error
            except ReadOnlyError as error:
                # It is no longer the master, and did nothing since: find the one that is.
                self.close()
                is_retry = is_retry or on.partly
                if demoted:
                    raise unavailable(f"the queue log at {self} is on a replica: {error}", sent=is_retry) from error
                demoted = True
            except ResponseError as error:
                raise self._explained(error, is_retry or on.partly) from error
            except TimeoutError as error:
                # Idle connections are closed too, so that no one else waits as long on one.
                self.close()
                # No repeat, as after a broken connection: the server is there, and had its time.
                raise unavailable(f"the queue log at {self} gave no answer in time: {error}", sent=True) from error
            except BusyLoadingError as error:
                raise unavailable(f"the queue log at {self} is loading its data", sent=is_retry or on.partly) from error
            except ConnectionError as error:
                # Another node may have its slots by now.
                opened.slots = {}
                if is_retry:
                    raise unavailable(f"the queue log at {self} gave no answer: {error}", sent=True) from error
                is_retry = True

    def close(self) -> None:
        """Close this process's connections. The next operation opens new ones."""
        opened = self._opened.pop(os.getpid(), None)
        if opened is not None:
            opened.close()

    def place_of(self, tag: bytes, opened: Opened) -> Place:  # noqa: ARG002 - there is one
        """Return the server that has a shard."""
        return THE_SERVER

    def _connect(self, place: Place) -> Wire:  # noqa: ARG002 - there is one
        where = dict(zip(("host", "port"), self._address.hosts[0], strict=True)) if self._address.hosts else {}
        return connect(self._address, **where)

    def _explained(self, error: ResponseError, sent: bool) -> StoreError:
        text = f"the queue log at {self} refused: {error}"
        # For want of memory only what would begin a row is refused, and then nothing of it was done.
        if isinstance(error, _PASSING) or str(error).startswith(_PASSING_TEXTS):
            return unavailable(text, sent=sent)
        return StoreError(text)


def connect(address: Address, **where: Any) -> Wire:
    """Open a connection to one server of an address."""
    timeouts = {"socket_connect_timeout": CONNECT, "socket_timeout": ANSWER}
    wire: Wire = address.connection(**{**timeouts, **address.options, **where})
    wire.connect()
    return wire
