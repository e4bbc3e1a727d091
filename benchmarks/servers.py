"""The servers of a run, as one has them in production: what they were told to keep is on the disk when they say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from tests.support.servers import PrivateMariaDB, PrivatePostgreSQL, PrivateRedis, PrivateServer

__all__ = ["MariaDB", "PostgreSQL", "Redis", "no_waiting_for_the_disk"]

# Each server takes the last word of an option that it is given twice.


class PostgreSQL(PrivatePostgreSQL):
    """PostgreSQL with its own defaults where the tests' has none of that: a commit waits for the disk."""

    def command(self) -> list[str]:
        options = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "shared_buffers": "128MB"}
        return [*super().command(), *(part for name, value in options.items() for part in ("-c", f"{name}={value}"))]


class MariaDB(PrivateMariaDB):
    """MariaDB with its own default: a commit waits for the disk."""

    def command(self) -> list[str]:
        return [*super().command(), "--innodb-flush-log-at-trx-commit=1", "--innodb-buffer-pool-size=128M"]


class Redis(PrivateRedis):
    """Redis with an append-only file that goes to the disk once a second, as its documentation advises for data that matters.

    One for everything: broker, result backend, the locks of the packages that take them, and the queue log of ``RedisStore``. Whoever
    keeps a queue log in Redis has one, most likely, and what is asked of it competes with what the broker is asked.
    """

    def command(self) -> list[str]:
        return [*super().command(), "--appendfsync", "everysec", "--maxmemory-policy", "noeviction"]


@contextmanager
def no_waiting_for_the_disk(server: PrivateServer | None) -> Iterator[None]:
    """Have what is committed on connections that are opened meanwhile go to the disk by and by."""
    match server:
        case PostgreSQL():
            off, on = (
                f"ALTER DATABASE test {what}" for what in ("SET synchronous_commit = off", "RESET synchronous_commit")
            )
        case MariaDB():
            off, on = (f"SET GLOBAL innodb_flush_log_at_trx_commit = {value}" for value in (0, 1))
        case _:
            yield
            return
    engine = sa.create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.execute(sa.text(off))
        try:
            yield
        finally:
            connection.execute(sa.text(on))
