"""A Redis Cluster: each shard of the log is wherever its slot is.

A shard's slot that is being moved to another node is out of reach until it has been: scripts would find one part of its rows here and
the other there. They name the shard's tag as their key, and no key is called that, so that the node that the slot leaves has none of them
run, and points to the other one (``ASK``), which is not followed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import (
    AskError,
    ConnectionError,  # noqa: A004 - redis-py's name
    MovedError,
    NoScriptError,
    RedisError,
    TimeoutError,  # noqa: A004 - redis-py's name
)

from celery_idempotent.stores.redis.address import Address
from celery_idempotent.stores.redis.connection import AT_ONCE, ScriptSession, Server, connect
from celery_idempotent.stores.redis.layout import Layout, slot
from celery_idempotent.stores.redis.pool import (
    Call,
    NoConnectionError,
    Opened,
    Place,
    Wire,
    Wires,
    ask,
    load,
    read_replies,
)
from celery_idempotent.stores.redis.rows import Argument

__all__ = ["Cluster"]

#: How often calls are sent after a slot that has moved, or again to a node that did not know the script.
_ROUNDS = 5


class Cluster(Server):
    """A cluster, as the store's operations see it."""

    def __init__(self, address: Address, layout: Layout, prepare: Callable[[ScriptSession], object]) -> None:
        super().__init__(address, layout, prepare)
        self._shard_of = {tag: shard for shard, tag in enumerate(layout.tags)}

    def _on(self, wires: Wires) -> ScriptSession:
        return _OnCluster(self, self._layout, wires)

    def _connect(self, place: Place) -> Wire:
        host, port = place
        return connect(self._address, host=host, port=port)

    def node_of(self, tag: bytes, opened: Opened) -> Place:
        """Return the node that has a shard."""
        if not opened.slots:
            opened.slots = self._find_slots(opened)
        return opened.slots[self._shard_of[tag]]

    def _find_slots(self, opened: Opened) -> list[Place]:
        """Where each shard is, by the first node that knows."""
        why = ""
        for place in dict.fromkeys((*self._address.hosts, *opened.idle)):
            try:
                wire = self._connect(place)
                ask(wire, [(b"CLUSTER", b"SLOTS")])
                (ranges,) = read_replies(wire, 1)
                wire.disconnect()
            except (RedisError, OSError) as error:
                why = str(error)
                continue
            if not isinstance(ranges, list):
                why = str(ranges)
                continue
            found = [_node(slot(tag), ranges, place) for tag in self._layout.tags]
            places = [node for node in found if node is not None]
            if len(places) == len(found):
                return places
            why = "some slots have no node"
        raise NoConnectionError(f"no node tells where the slots are: {why}")


class _OnCluster(ScriptSession):
    """Connections to the nodes of a cluster, as they are needed."""

    whole = False

    def __init__(self, cluster: Cluster, layout: Layout, wires: Wires) -> None:
        super().__init__(layout)
        self._cluster = cluster
        self._wires = wires

    def send(self, calls: Sequence[Call], *, at_one_moment: bool = False) -> list[Any]:  # noqa: ARG002 - there is none
        answers: list[Any] = [None] * len(calls)
        left = list(range(len(calls)))
        for _ in range(_ROUNDS):
            for place, answer in self._exchange(calls, left):
                answers[place] = answer
            left = [place for place in left if isinstance(answers[place], MovedError | NoScriptError)]
            if not left:
                break
            if any(isinstance(answers[place], MovedError) for place in left):
                self._wires.opened.slots = []
        if any(isinstance(answer, AskError) for answer in answers):
            self.partly = not all(isinstance(answer, Exception) for answer in answers)
            raise NoConnectionError("a part of it is being moved to another node")
        return self._all_good(answers)

    def command_each(self, commands: Sequence[Sequence[Argument]]) -> dict[str, list[Any]]:
        nodes = dict.fromkeys(self._cluster.node_of(tag, self._wires.opened) for tag in self.layout.tags)
        wires = {f"{host}:{port}": self._wires.to((host, port)) for host, port in nodes}
        for wire in wires.values():
            ask(wire, commands)
        return {name: read_replies(wire, len(commands)) for name, wire in wires.items()}

    def _exchange(self, calls: Sequence[Call], places: Sequence[int]) -> list[tuple[int, Any]]:
        """Make calls on all nodes that they concern, in one round trip."""
        by_node: dict[Wire, list[int]] = defaultdict(list)
        try:
            for place in places:
                node = self._cluster.node_of(calls[place].tags[0], self._wires.opened)
                by_node[self._wires.to(node)].append(place)
            for wire, some in by_node.items():
                ask(wire, [calls[place].command for place in some])
            answers = [
                answered
                for wire, some in by_node.items()
                for answered in zip(some, read_replies(wire, len(some)), strict=True)
            ]
            unknown = {place for place, answer in answers if isinstance(answer, NoScriptError)}
            for wire, some in by_node.items():
                if scripts := [calls[place].script for place in some if place in unknown]:
                    load(wire, scripts)
        except (NoConnectionError, ConnectionError, TimeoutError):
            # Its node is gone: by the next time another one may have its slots.
            self._wires.opened.slots = []
            raise
        return answers

    def _in_calls(self, shards: Sequence[int]) -> list[Sequence[int]]:
        of_shard: dict[int, list[int]] = defaultdict(list)
        for place, shard in enumerate(shards):
            of_shard[shard].append(place)
        return [some[first : first + AT_ONCE] for some in of_shard.values() for first in range(0, len(some), AT_ONCE)]


def _node(slot: int, ranges: Sequence[Any], asked: Place) -> Place | None:
    """Return the master of a slot; a node that does not know its own name is the one that was asked."""
    for first, last, (host, port, *_), *_ in ranges:
        if first <= slot <= last:
            return host.decode() or asked[0] if host else asked[0], int(port)
    return None
