"""The layout in Redis: the shards of a log, the keys of a row, the indexes.

A log is spread over :data:`SHARDS` hash tags, and a message belongs to one of them by its key. All keys of a shard are in one slot of a
Redis Cluster, so that a script may touch a row and every index it is in. A single server has the same layout::

    {queue_log:6.43}:row:11:shop.charge:order:1  hash: the columns, null ones left out, moments in microseconds since 1970
    {queue_log:6.43}:big:11:shop.charge:order:1  hash: message, result and steps, apart so that the row stays small and compact
    {queue_log:6.43}:unsent                      sorted set: pending, never handed to the broker, by when it was recorded
    {queue_log:6.43}:waiting:celery              sorted set: pending and published, by when it was published or is due; per queue
    {queue_log:6.43}:queues                      set: the queues of which there is such an index
    {queue_log:6.43}:running                     sorted set: processing, by when the lease runs out
    {queue_log:6.43}:done                        sorted set: done, by when; what ``purge`` reads
    {queue_log:6.43}:kept                        sorted set: done, by when the id becomes free again (``unique_for``)
    {queue_log:6.43}:recent                      sorted set: the last thousand that ran to an end
    {queue_log:0.13}:layout                      string, in the first shard only: the version of all this

A row is in exactly one of *unsent*, *waiting*, *running*, *done* and *kept*. An index holds its rows' identities: the length
of the task's name in bytes, the name, and the message id.
"""

from __future__ import annotations

import zlib
from itertools import count

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from celery_idempotent.core.records import MessageKey
from celery_idempotent.errors import ConfigurationError

__all__ = ["SHARDS", "VERSION", "Layout", "encoded", "identity", "key_of"]

#: How many parts a log has. It is part of the layout: a log that was written with another number is not found.
SHARDS = 16

#: The version of the layout, kept with the rows.
VERSION = b"1"


class Layout:
    """The keys of one log.

    Args:
        table: Its name, which all its keys begin with.

    Raises:
        ConfigurationError: The name is empty, or has braces, which mean something in a key.
    """

    def __init__(self, table: str) -> None:
        if not table or set("{}") & set(table):
            raise ConfigurationError(f"the queue log's table in Redis is a name without braces, not {table!r}")
        #: The hash tag of each shard, in braces. Their slots are spread evenly, for a cluster of two, four or sixteen parts.
        self.tags = [_tag(table, shard) for shard in range(SHARDS)]

    @staticmethod
    def shard(ident: bytes) -> int:
        """Return the shard that a row is in."""
        return zlib.crc32(ident) % SHARDS

    def tag(self, ident: bytes) -> bytes:
        """Return the hash tag of the shard that a row is in."""
        return self.tags[zlib.crc32(ident) % SHARDS]


def identity(key: MessageKey) -> bytes:
    """Return the name of a row in its keys and in the indexes."""
    task_name = encoded(key.task_name)
    return b"%d:%b:%b" % (len(task_name), task_name, encoded(key.message_id))


def key_of(ident: bytes) -> MessageKey:
    """Return the key of the row that is called so."""
    length, _, rest = ident.partition(b":")
    end = int(length)
    return MessageKey(rest[end + 1 :].decode("utf-8", "surrogatepass"), rest[:end].decode("utf-8", "surrogatepass"))


def encoded(text: str) -> bytes:
    """Return any text as bytes that can be decoded again."""
    return text.encode("utf-8", "surrogatepass")


def _tag(table: str, shard: int) -> bytes:
    for number in count():
        tag = b"{%b:%x.%d}" % (encoded(table), shard, number)
        if key_slot(tag) * SHARDS // REDIS_CLUSTER_HASH_SLOTS == shard:
            return tag
    raise AssertionError  # pragma: no cover - numbers do not end
