"""What each update pays for indexes and for space left free: write-ahead log, HOT updates, size and processor per message."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import psutil
import sqlalchemy as sa

from benchmarks.scale.server import DurablePostgreSQL, processor_seconds, wal_written
from benchmarks.scale.traffic import new_messages, run
from celery_idempotent.stores.sql import SQLStore

__all__ = ["LAYOUTS", "Layout", "layouts", "price"]

#: Messages in flight at once.
IN_FLIGHT = 100


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to lay the table out.

    Attributes:
        name: What it is called in the report.
        fillfactor: Percent of a page that inserts fill.
        dropped: Indexes of the library that it does without.
        made: Indexes that it has instead, as SQL behind ``CREATE INDEX ON table``.
    """

    name: str
    fillfactor: int = 100
    dropped: Sequence[str] = ()
    made: Sequence[str] = ()


#: ``open`` has the status, which a claim changes; ``processed`` has what a completion changes.
LAYOUTS = [
    *(Layout(f"as it is, fillfactor {percent}", percent) for percent in (100, 90, 70, 50)),
    *(
        Layout(
            f"`open` without the status, fillfactor {percent}",
            percent,
            ("open",),
            ("(queue, published_at) WHERE processed_timestamp IS NULL",),
        )
        for percent in (100, 70, 50)
    ),
    *(Layout(f"the key alone, fillfactor {percent}", percent, ("open", "processed")) for percent in (100, 70, 50)),
]


def layouts(server: DurablePostgreSQL, connection: sa.Connection, *, messages: int) -> list[dict[str, Any]]:
    """Send the same traffic through a table of each layout."""
    answer = []
    for layout in LAYOUTS:
        table = "layout"
        connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
        with closing(SQLStore(server.url, table=table)) as store:
            store.init()
        for name in layout.dropped:
            connection.execute(sa.text(f"DROP INDEX {table}_{name}"))
        for definition in layout.made:
            connection.execute(sa.text(f"CREATE INDEX ON {table} {definition}"))
        connection.execute(sa.text(f"ALTER TABLE {table} SET (fillfactor = {layout.fillfactor})"))
        answer.append({"layout": layout.name, **price(server, connection, table, messages=messages)})
        connection.execute(sa.text(f"DROP TABLE {table}"))
    return answer


def price(
    server: DurablePostgreSQL,
    connection: sa.Connection,
    table: str,
    *,
    messages: int,
    settings: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what a message costs the server in a log: measured over some thousand that are recorded, claimed and completed."""
    # What is written and computed is the same, whether or not somebody waits for the disk.
    chosen = {"synchronous_commit": "off", **(settings or {})}
    url = sa.make_url(server.url).update_query_dict(
        {"options": " ".join(f"-c{name}={value}" for name, value in chosen.items())}
    )
    connection.execute(sa.text("CHECKPOINT"))
    before = _updates(connection, table)
    with closing(SQLStore(url, table=table)) as store:
        run(store, new_messages(IN_FLIGHT))
        process = psutil.Process(server.pid)
        spent, own, began = processor_seconds(process), time.process_time(), time.monotonic()
        sent = _sent()
        with wal_written(connection) as written:
            for _ in range(messages // IN_FLIGHT):
                run(store, new_messages(IN_FLIGHT))
            took = time.monotonic() - began
            own = time.process_time() - own
            sent = _sent() - sent
        spent = processor_seconds(process) - spent
    after = _updates(connection, table)
    sizes = connection.execute(
        sa.text(
            f"SELECT count(*), pg_relation_size('{table}'), pg_table_size('{table}'), pg_indexes_size('{table}') FROM {table}"
        )
    ).one()
    wal = written[0]
    return {
        "messages": messages,
        "wal bytes a message": {name: size / messages for name, size in sorted(wal.records.items())},
        "wal records, bytes a message": wal.record_bytes / messages,
        "wal page images, bytes a message": wal.page_images / messages,
        "hot share": (after[1] - before[1]) / (after[0] - before[0]),
        "server processor ms a message": 1e3 * spent / messages,
        "client processor ms a message": 1e3 * own / messages,
        "messages a second, one client": messages / took,
        "network bytes a message, both ways": sent / messages,
        "bytes a row": {
            "heap": sizes[1] / sizes[0],
            "toast": (sizes[2] - sizes[1]) / sizes[0],
            "indexes": sizes[3] / sizes[0],
        },
    }


def _sent() -> int:
    """Bytes that have gone over the loopback interface, on which the two talk alone."""
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


def _updates(connection: sa.Connection, table: str) -> tuple[int, int]:
    """Return the updates of a table so far, and those that were HOT; once the sessions that made them have told."""
    deadline = time.monotonic() + 10
    text = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    while connection.execute(text).scalar_one() and time.monotonic() < deadline:
        time.sleep(0.02)
    counted = connection.execute(
        sa.text("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relid = CAST(:table AS regclass)"),
        {"table": table},
    ).one()
    return int(counted[0]), int(counted[1])
