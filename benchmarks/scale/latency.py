"""What a verb takes in a long log and in a short one: on one server, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from benchmarks.scale.traffic import VERBS, Times, new_messages, run
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage
from celery_idempotent.stores.sql import SQLStore

__all__ = ["latency"]

#: Messages that are in flight at once, in each round and log.
IN_FLIGHT = 50


def latency(
    url: str, connection: sa.Connection, tables: Sequence[str], *, rounds: int, backlog: int = 10
) -> dict[str, Any]:
    """Medians and 99th percentiles by table and verb, and how they compare, round by round.

    Args:
        url: The server.
        connection: To ask it on the side.
        tables: The logs; every other is compared with the last.
        rounds: How often each has its turn.
        backlog: Of what waits in a log, and has not been touched since it was filled, so many are claimed in each round.
    """
    stores = {table: SQLStore(url, table=table) for table in tables}
    waiting = {table: _waiting(connection, table, rounds * backlog) for table in tables}
    connection.execute(sa.text("CHECKPOINT"))
    for store in stores.values():
        run(store, new_messages(IN_FLIGHT))  # its statements are compiled and prepared
    by_round: dict[str, list[Times]] = {table: [] for table in tables}
    of_backlog: dict[str, list[float]] = {table: [] for table in tables}
    for number in range(rounds):
        for table in tables if number % 2 else reversed(tables):
            by_round[table].append(run(stores[table], new_messages(IN_FLIGHT)))
            old, waiting[table] = waiting[table][:backlog], waiting[table][backlog:]
            of_backlog[table] += _claimed(stores[table], old)
    for store in stores.values():
        store.close()
    base = tables[-1]
    answer: dict[str, Any] = {"messages": rounds * IN_FLIGHT, "rounds": rounds, "tables": {}, "ratios": {}}
    for table in tables:
        whole = Times().extend(by_round[table]).milliseconds()
        whole["claim of the backlog"] = Times(claim=of_backlog[table]).milliseconds().get("claim", {})
        answer["tables"][table] = whole
    for table in tables[:-1]:
        answer["ratios"][table] = {
            verb: {
                "p50": _ratio(answer, table, base, verb, "p50"),
                "p99": _ratio(answer, table, base, verb, "p99"),
                "p50 by round, quartiles": _quartiles(by_round[table], by_round[base], verb),
            }
            for verb in VERBS
        }
        answer["ratios"][table]["claim of the backlog"] = {
            each: _ratio(answer, table, base, "claim of the backlog", each) for each in ("p50", "p99")
        }
    return answer


def _ratio(answer: dict[str, Any], table: str, base: str, verb: str, which: str) -> float:
    return float(answer["tables"][table][verb][which] / answer["tables"][base][verb][which])


def _quartiles(these: list[Times], those: list[Times], verb: str) -> list[float]:
    ratios = [
        statistics.median(one.of(verb)) / statistics.median(other.of(verb))
        for one, other in zip(these, those, strict=True)
    ]
    return statistics.quantiles(ratios, n=4)


def _waiting(connection: sa.Connection, table: str, count: int) -> list[NewMessage]:
    """Messages that wait since the log was filled, from all over it."""
    text = f"SELECT message_id, task_name, task_id, fingerprint FROM {table} WHERE processed_timestamp IS NULL AND status = 'pending' AND queue = 'slow' ORDER BY random() LIMIT :count"
    rows = connection.execute(sa.text(text), {"count": count})
    return [NewMessage(MessageKey(row.message_id, row.task_name), row.task_id, "slow", row.fingerprint) for row in rows]


def _claimed(store: SQLStore, messages: Sequence[NewMessage]) -> list[float]:
    times = []
    for message in messages:
        began = time.perf_counter()
        answer = store.claim(message, worker="worker-7.shop.example:20001", lease=60.0, grace=30.0)
        times.append(time.perf_counter() - began)
        assert isinstance(answer, Claimed)
    return times
