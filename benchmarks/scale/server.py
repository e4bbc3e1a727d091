"""The PostgreSQL that is measured: one of its own, durable as in production, whose data can be kept between two commands."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from tests.support.servers import PrivatePostgreSQL
from tests.support.servers.private import free_port

__all__ = ["DurablePostgreSQL", "Wal", "processor_seconds", "wal_written"]

#: What differs from PostgreSQL's defaults, and from the servers of the tests: durable, and sized for a small server.
SETTINGS = {
    "fsync": "on",
    "full_page_writes": "on",
    "shared_buffers": "2GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "15min",
    "track_io_timing": "on",
}


class DurablePostgreSQL(PrivatePostgreSQL):
    """PostgreSQL that writes every commit to disk.

    Args:
        keep: A directory for its data, used again by the next one that is given it. ``None`` for one that goes when it is closed.
    """

    patience = 120.0  # to write what it has, or to read it again

    def __init__(self, keep: Path | None = None) -> None:
        super().__init__()
        self._keep = keep
        if keep is not None:
            self.directory.rmdir()
            self._prepared = keep.joinpath("ready").exists()
            if not self._prepared:
                shutil.rmtree(keep, ignore_errors=True)
                keep.mkdir(parents=True)
                if self._user is not None:
                    shutil.chown(keep, self._user)
            self.directory = keep
            self.port = free_port()

    def command(self) -> list[str]:
        return [*super().command(), *(part for name, value in SETTINGS.items() for part in ("-c", f"{name}={value}"))]

    def furnish(self) -> None:
        super().furnish()
        engine = sa.create_engine(self.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            for extension in ("pg_walinspect", "pgstattuple"):
                connection.execute(sa.text(f"CREATE EXTENSION {extension}"))
        if self._keep is not None:
            self._keep.joinpath("ready").touch()

    def close(self) -> None:
        if self._keep is None:
            super().close()
        else:
            self.stop()

    @contextmanager
    def administering(self) -> Iterator[sa.Connection]:
        """Yield a connection for what is done around a measurement, each statement on its own."""
        engine = sa.create_engine(self.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            yield connection


@dataclass(frozen=True, slots=True)
class Wal:
    """What was written to the write-ahead log between two moments.

    Attributes:
        records: Bytes of records, by resource manager (``Heap``, ``Btree``, ...).
        page_images: Bytes of whole pages: each page once after each checkpoint.
    """

    records: dict[str, int]
    page_images: int

    @property
    def record_bytes(self) -> int:
        return sum(self.records.values())


@contextmanager
def wal_written(connection: sa.Connection) -> Iterator[list[Wal]]:
    """Put into the list what was written while the block ran."""
    answer: list[Wal] = []
    began = connection.execute(sa.text("SELECT pg_current_wal_flush_lsn()")).scalar()
    yield answer
    connection.execute(sa.text("SELECT pg_switch_wal()"))  # which flushes, synchronous commits or not
    rows: list[Any] = list(
        connection.execute(
            sa.text(
                'SELECT "resource_manager/record_type", record_size, fpi_size FROM pg_get_wal_stats(:began, pg_current_wal_flush_lsn())'
            ),
            {"began": began},
        )
    )
    answer.append(Wal({name: int(size) for name, size, _ in rows if size}, sum(int(images) for *_, images in rows)))


def processor_seconds(server: psutil.Process) -> float:
    """Return the processor time that a server has used, with all of its processes, living and dead."""
    of_itself = server.cpu_times()
    spent = of_itself.user + of_itself.system + of_itself.children_user + of_itself.children_system
    for child in server.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:  # and its time is its parent's now
            continue
        spent += times.user + times.system
    return spent
