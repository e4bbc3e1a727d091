"""A private Redis Cluster: some masters, without replicas."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Self

from redis import Redis

from tests.support.servers.private import free_port
from tests.support.servers.redis import PrivateRedis
from tests.support.waiting import wait_until

__all__ = ["PrivateRedisCluster"]

_SLOTS = 16384


class _Node(PrivateRedis):
    def __init__(self) -> None:
        super().__init__()
        # On which nodes talk to each other. By default it is far above the other one, among those of outgoing connections.
        self.bus = free_port()

    def command(self) -> list[str]:
        options = {"cluster-enabled": "yes", "cluster-port": str(self.bus), "cluster-node-timeout": "2000"}
        return [*super().command(), *(part for name, value in options.items() for part in (f"--{name}", value))]


class PrivateRedisCluster:
    """Use as a context manager.

    Args:
        size: How many masters; the slots are spread evenly.

    Attributes:
        nodes: The masters.
    """

    def __init__(self, size: int = 3) -> None:
        self.nodes = [_Node() for _ in range(size)]
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        """The store's URL, by way of one of the nodes."""
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port}"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for number, node in enumerate(self.nodes):
                stack.enter_context(node)
                with Redis.from_url(node.url) as client:
                    first = number * _SLOTS // len(self.nodes)
                    last = (number + 1) * _SLOTS // len(self.nodes) - 1
                    client.cluster("ADDSLOTSRANGE", first, last)
                    if number:
                        client.cluster("MEET", "127.0.0.1", self.nodes[0].port, self.nodes[0].bus)
            wait_until(self._is_whole, describe="the cluster")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _is_whole(self) -> bool:
        """Return whether every node knows where all slots are."""
        for node in self.nodes:
            with Redis.from_url(node.url) as client:
                info: bytes = client.execute_command("CLUSTER", "INFO")
                if not {b"cluster_state:ok", b"cluster_slots_ok:%d" % _SLOTS} <= set(info.splitlines()):
                    return False
        return True
