"""The rows of a queue log, as its server has them: how many, how large, and none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis
import sqlalchemy as sa

__all__ = ["clear", "count", "size"]

_SIZES = {
    "postgresql": ("SELECT pg_total_relation_size('queue_log')",),
    "mysql": (
        # What is on the disk is written there some time later, but its place is taken at once.
        "SELECT file_size FROM information_schema.innodb_sys_tablespaces WHERE name = concat(database(), '/queue_log')",
    ),
    "sqlite": (
        "PRAGMA wal_checkpoint(TRUNCATE)",
        # The file keeps the pages of rows that are gone.
        "SELECT (page_count - freelist_count) * page_size FROM pragma_page_count(), pragma_freelist_count(), pragma_page_size()",
    ),
}


def clear(url: str) -> None:
    """Remove all rows. In Redis, whatever is in that database."""
    if url.startswith("redis"):
        with redis.Redis.from_url(url) as client:
            client.flushdb()
        return
    with _connected(url) as connection:
        connection.execute(sa.text(f"{'DELETE FROM' if _kind(url) == 'sqlite' else 'TRUNCATE'} queue_log"))


def size(url: str) -> int:
    """Bytes that the rows and their indexes take up, with what the database has not cleaned up yet."""
    if url.startswith("redis"):
        with redis.Redis.from_url(url) as client:
            # Of each key all of it, not an estimate by some of its members.
            return sum(client.memory_usage(key, samples=0) or 0 for key in client.scan_iter("{queue_log*", count=1000))
    with _connected(url) as connection:
        return [int(connection.scalar(sa.text(question)) or 0) for question in _SIZES[_kind(url)]][-1]


def count(url: str) -> int:
    """How many there are."""
    if url.startswith("redis"):
        with redis.Redis.from_url(url) as client:
            return sum(1 for _ in client.scan_iter("{queue_log*:row:*", count=1000))
    with _connected(url) as connection:
        return int(connection.scalar(sa.text("SELECT count(*) FROM queue_log")) or 0)


def _kind(url: str) -> str:
    return sa.make_url(url).get_backend_name()


@contextmanager
def _connected(url: str) -> Iterator[sa.Connection]:
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        yield connection
    engine.dispose()
