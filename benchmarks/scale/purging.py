"""Old rows deleted in small batches beside live traffic: how fast, and what the traffic feels of it."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import sqlalchemy as sa

from benchmarks.scale.traffic import Times, new_messages, run
from celery_idempotent.core.store import BATCH
from celery_idempotent.stores.sql import SQLStore

__all__ = ["purging"]

#: Messages in flight, and the rest behind each verb, in seconds: some hundred messages a second, which leave the server time.
IN_FLIGHT = 20
PAUSE = 0.001


@dataclass(frozen=True, slots=True)
class _Purged:
    rows: int
    seconds: float
    batches: list[float]


def purging(
    url: str, connection: sa.Connection, table: str, *, older_than: float, phase: float, phases: int
) -> dict[str, Any]:
    """Phases of traffic alone and of traffic beside a purge, in turns.

    Args:
        url: The server.
        connection: To ask it on the side.
        table: The log.
        older_than: Seconds: what was done before is purged.
        phase: Seconds of each phase.
        phases: How many of either kind.
    """
    due = (
        f"SELECT count(*) FROM {table} WHERE processed_timestamp <= statement_timestamp() - :ago * INTERVAL '1 second'"
    )
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    purger = multiprocessing.get_context("spawn").Process(target=_purge, args=(url, table, older_than, theirs))
    purger.start()
    alone, beside, rates, batches = Times(), Times(), [], list[float]()
    rows = 0
    with closing(SQLStore(url, table=table)) as store:
        run(store, new_messages(IN_FLIGHT))
        for _ in range(phases):
            _traffic(store, alone, phase)
            ours.send(phase)
            _traffic(store, beside, phase)
            done: _Purged = ours.recv()
            rows += done.rows
            rates.append(done.rows / done.seconds)
            batches += done.batches
    ours.send(None)
    purger.join()
    statistics_of_table = connection.execute(
        sa.text("SELECT n_dead_tup, autovacuum_count FROM pg_stat_user_tables WHERE relname = :table"), {"table": table}
    ).one()
    return {
        "batch": BATCH,
        "rows": rows,
        "left": connection.execute(sa.text(due), {"ago": older_than}).scalar_one(),
        "rows per second, by phase": rates,
        "batch ms": {"p50": 1e3 * statistics.median(batches), "max": 1e3 * max(batches)},
        "traffic alone": alone.milliseconds(),
        "traffic beside": beside.milliseconds(),
        "messages a second alone": len(alone.complete) / (phase * phases),
        "messages a second beside": len(beside.complete) / (phase * phases),
        "dead rows left": statistics_of_table[0],
        "autovacuums": statistics_of_table[1],
    }


def _traffic(store: SQLStore, times: Times, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        run(store, new_messages(IN_FLIGHT), times=times, pause=PAUSE)


def _purge(url: str, table: str, older_than: float, told: Connection) -> None:
    """Purge for as long as one is told, and tell what came of it; in a process of its own."""
    store = SQLStore(url, table=table)
    store.check()
    while (seconds := told.recv()) is not None:
        began = time.monotonic()
        rows, batches = 0, []
        while time.monotonic() - began < seconds:
            before = time.perf_counter()
            deleted = store.purge(older_than=older_than, limit=BATCH)
            batches.append(time.perf_counter() - before)
            rows += deleted
            if deleted < BATCH:
                break
        told.send(_Purged(rows, time.monotonic() - began, batches))
    store.close()
