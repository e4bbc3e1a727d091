"""Connections: kept open per process, one round trip per call, and what to do when the server does not answer.

A kept connection that its server has closed meanwhile is told by its socket, without a round trip. One that breaks under a call has
the operation repeated once on a fresh one; what an operation does on such a repeat is its own matter (its ``is_retry``), because the first
attempt may have taken effect. A server that does not answer at all is not waited for longer than :data:`ANSWER`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,  # noqa: A004 - redis-py's name
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,  # noqa: A004 - redis-py's name
    TryAgainError,
)

from celery_idempotent.errors import IdempotentError, StoreError, StoreUnavailableError
from celery_idempotent.stores.redis.address import Address
from celery_idempotent.stores.redis.layout import Layout
from celery_idempotent.stores.redis.pool import (
    THE_SERVER,
    Call,
    NoConnectionError,
    Opened,
    Place,
    Wire,
    Wires,
    ask,
    exchange,
    load,
    read_replies,
)
from celery_idempotent.stores.redis.rows import Argument
from celery_idempotent.stores.redis.scripts import Script

__all__ = ["AT_ONCE", "ScriptSession", "Server", "connect"]

T = TypeVar("T")

#: Seconds for an answer. Far more than one takes, and less than a broker waits for a heartbeat.
ANSWER = 20.0

#: Seconds until a server takes a connection.
CONNECT = 10.0

#: Messages that one script is given, at most: a server does nothing else meanwhile.
AT_ONCE = 100

#: Refusals by which nothing was done, and which pass: no memory, no disk, a script of somebody's that runs for too long, a failover.
_PASSING = (OutOfMemoryError, MasterDownError, ClusterDownError, TryAgainError)
_PASSING_TEXTS = ("MISCONF", "BUSY ", "NOREPLICAS", "UNKILLABLE")


class ScriptSession(ABC):
    """What an operation works on: scripts are called, and their answers come back.

    Attributes:
        layout: Where things are.
    """

    #: Whether all shards are on one server, with one clock.
    whole = True

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        #: Whether some calls of those that were made together took effect when others were refused.
        self.partly = False

    @abstractmethod
    def send(self, calls: Sequence[Call], *, at_one_moment: bool = False) -> list[Any]:
        """Make some calls in one round trip; their answers.

        Args:
            calls: In this order.
            at_one_moment: Whether nobody else's may come between them, where one server has them all.
        """

    @abstractmethod
    def command_each(self, commands: Sequence[Sequence[Argument]]) -> dict[str, list[Any]]:
        """Give commands to every server in one round trip; what each answers, by its name. A refusal is an answer too."""

    def call(self, script: Script, ident: bytes, *arguments: Argument) -> Any:
        """Call a script for one message."""
        (answer,) = self.send((Call(script, (self.layout.tag(ident),), arguments),))
        return answer

    def call_all(
        self, script: Script, common: Sequence[Argument], items: Sequence[tuple[bytes, Sequence[Argument]]]
    ) -> list[Any]:
        """Call a script that takes many messages, in the order of the list; an answer each.

        Args:
            script: It answers with a list.
            common: The arguments that come first.
            items: Each message's identity and its arguments.
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
        """Call a script for some shards, with arguments for each; an answer each, all of one moment."""
        calls = [Call(script, (self.layout.tags[shard],), some) for shard, some in arguments]
        return self.send(calls, at_one_moment=True)

    def _all_good(self, answers: list[Any]) -> list[Any]:
        """Return the answers, if none is a refusal."""
        refused = [answer for answer in answers if isinstance(answer, Exception)]
        if refused:
            self.partly = len(refused) < len(answers)
            raise refused[0]
        return answers

    def _in_calls(self, shards: Sequence[int]) -> list[Sequence[int]]:
        """Return the places in a list of messages that are the business of one call each."""
        return [range(first, min(first + AT_ONCE, len(shards))) for first in range(0, len(shards), AT_ONCE)]


class _OnServer(ScriptSession):
    """One connection to a server that has all shards."""

    def __init__(self, layout: Layout, wires: Wires) -> None:
        super().__init__(layout)
        self._wires = wires

    def send(self, calls: Sequence[Call], *, at_one_moment: bool = False) -> list[Any]:
        wire = self._wires.to(THE_SERVER)
        at_one_moment = at_one_moment and len(calls) > 1
        answers = exchange(wire, calls, at_one_moment=at_one_moment)
        unknown = [place for place, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if unknown:
            # The server was restarted, or is new: it is told the scripts, and asked again.
            load(wire, [calls[place].script for place in unknown])
            repeated = exchange(wire, [calls[place] for place in unknown], at_one_moment=at_one_moment)
            for place, answer in zip(unknown, repeated, strict=True):
                answers[place] = answer
        return self._all_good(answers)

    def command_each(self, commands: Sequence[Sequence[Argument]]) -> dict[str, list[Any]]:
        wire = self._wires.to(THE_SERVER)
        ask(wire, commands)
        return {"": read_replies(wire, len(commands))}


class Server:
    """A server as the store's operations see it: somewhere to run them. No lock is held that a fork could leave locked.

    Args:
        address: Where it is.
        layout: Where in it things are.
        prepare: Called once per process before the first operation; until it succeeds.
    """

    def __init__(self, address: Address, layout: Layout, prepare: Callable[[ScriptSession], object]) -> None:
        self._address = address
        self._layout = layout
        self._prepare = prepare
        # By process id: after a fork, what the parent opened is left alone, but referred to, lest the garbage collector
        # closes the parent's connections from the child.
        self._opened: dict[int, Opened] = {}

    def __str__(self) -> str:
        return self._address.text

    def run(self, operation: Callable[[ScriptSession, bool], T], *, prepared: bool = True) -> T:
        """Run an operation on a connection, repeating it once if that breaks.

        Args:
            operation: Given what it works on, and whether an earlier attempt broke off with its connection.
            prepared: Whether the layout has to be looked at before; ``False`` for operations that look after it themselves.

        Raises:
            StoreUnavailableError: No connection, or it broke twice, or no answer, or the server cannot do it for now.
            StoreError: Any other refusal of the server's, which repeating would not change.
        """
        is_retry = demoted = False
        while True:
            # ``setdefault`` is atomic.
            opened = self._opened.get(os.getpid()) or self._opened.setdefault(os.getpid(), Opened())
            wires = Wires(opened, self._connect)
            on = self._on(wires)
            try:
                opened.begin(wires, at_once=self._address.at_once, patience=CONNECT)
                if prepared and not opened.ready:
                    self._prepare(on)
                    opened.ready = True
                answer = operation(on, is_retry)
            except NoConnectionError as error:
                wires.give_back()
                raise _unavailable(
                    f"the queue log at {self} cannot be reached: {error}", is_retry or on.partly
                ) from error
            except IdempotentError:
                wires.give_back()
                raise
            except ReadOnlyError as error:
                # Not the master any more: nothing was done, and whoever is has to be found.
                wires.disconnect()
                self.close()
                if demoted:
                    raise _unavailable(f"the queue log at {self} is on a replica: {error}", is_retry) from error
                demoted = True
            except ResponseError as error:
                wires.give_back()
                raise self._explained(error, is_retry or on.partly) from error
            except TimeoutError as error:
                wires.disconnect()
                # Nobody else is to wait as long on a connection of before.
                self.close()
                # Not repeated, as a connection that broke is: the server is there, and had its time.
                raise _unavailable(f"the queue log at {self} gave no answer in time: {error}", sent=True) from error
            except BusyLoadingError as error:
                wires.disconnect()
                raise _unavailable(f"the queue log at {self} is loading its data", is_retry or on.partly) from error
            except ConnectionError as error:
                wires.disconnect()
                if is_retry:
                    raise _unavailable(f"the queue log at {self} gave no answer: {error}", sent=True) from error
                is_retry = True
            except BaseException:
                # Celery's soft time limit and the like are raised by signal, perhaps in the middle of an answer: whoever
                # used this connection next would read the rest of it.
                wires.disconnect()
                raise
            else:
                wires.give_back()
                return answer

    def close(self) -> None:
        """Close this process's connections. The next operation opens new ones."""
        opened = self._opened.pop(os.getpid(), None)
        if opened is not None:
            opened.close()

    def _on(self, wires: Wires) -> ScriptSession:
        return _OnServer(self._layout, wires)

    def _connect(self, place: Place) -> Wire:  # noqa: ARG002 - there is one
        where = dict(zip(("host", "port"), self._address.hosts[0], strict=True)) if self._address.hosts else {}
        return connect(self._address, **where)

    def _explained(self, error: ResponseError, sent: bool) -> StoreError:
        text = f"the queue log at {self} refused: {error}"
        # For want of memory only what would begin a row is refused, and then nothing of it was done.
        if isinstance(error, _PASSING) or str(error).startswith(_PASSING_TEXTS):
            return _unavailable(text, sent)
        return StoreError(text)


def connect(address: Address, **where: Any) -> Wire:
    """Open a connection to one server of an address."""
    timeouts = {"socket_connect_timeout": CONNECT, "socket_timeout": ANSWER}
    wire: Wire = address.connection(**{**timeouts, **address.options, **where})
    wire.connect()
    return wire


def _unavailable(text: str, sent: bool) -> StoreUnavailableError:
    error = StoreUnavailableError(text)
    error.unsent = not sent
    return error
