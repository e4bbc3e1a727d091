"""A Redis Cluster: each shard of the log is on the node that has its slot.

While a slot is moved to another node, its shard is out of reach, because a script would find only some of its rows. Scripts name the shard's
tag as their key, and there is no such key. So the node that the slot leaves runs no script, and answers ``ASK``, which is not followed.
"""

from __future__ import annotations

from redis.cluster import parse_cluster_slots
from redis.crc import key_slot
from redis.exceptions import RedisError

from celery_idempotent.stores.redis.connection import Server, connect
from celery_idempotent.stores.redis.pool import Connection, ConnectionPool, NoConnectionError, Place, ask, read_replies

__all__ = ["Cluster"]


class Cluster(Server):
    """The nodes of a cluster."""

    whole = False

    def place_of(self, tag: bytes, pool: ConnectionPool) -> Place:
        """Return the node that has a shard."""
        slots = pool.slots  # another thread may empty it at any time
        if not slots:
            slots = pool.slots = self._find_slots(pool)
        return slots[tag]

    def _connect(self, place: Place) -> Connection:
        host, port = place
        return connect(self._address, host=host, port=port)

    def _find_slots(self, pool: ConnectionPool) -> dict[bytes, Place]:
        """Return the node of each shard, by the first node that knows."""
        why = ""
        for place in dict.fromkeys((*self._address.hosts, *pool.idle)):
            try:
                connection = self._connect(place)
                ask(connection, [(b"CLUSTER", b"SLOTS")])
                (ranges,) = read_replies(connection, 1)
                connection.disconnect()
            except (RedisError, OSError) as error:
                why = str(error)
                continue
            if isinstance(ranges, Exception):
                why = str(ranges)
                continue
            # A node that does not know its own host is the one we asked.
            masters = parse_cluster_slots(ranges, current_host=place[0])
            found = {
                tag: node["primary"]
                for tag in self._layout.tags
                for (first, last), node in masters.items()
                if first <= key_slot(tag) <= last
            }
            if len(found) == len(self._layout.tags):
                return found
            why = "some slots have no node"
        raise NoConnectionError(f"no node tells where the slots are: {why}")
