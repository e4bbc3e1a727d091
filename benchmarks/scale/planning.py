"""The plans that the tests pin on some hundred thousand rows, looked at on as many as there are."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import sqlalchemy as sa

from celery_idempotent.stores.sql import SQLStore
from tests.integration.stores.sql import long_log, plans, verbs

__all__ = ["planning"]


def planning(url: str, table: str) -> dict[str, Any]:
    """Carry out every verb in every situation, and compare how with what is pinned.

    Returns:
        How many statements were looked at; those that were carried out in another way; and how many seconds those questions took
        that are answered by the whole table.
    """
    engine = sa.create_engine(url)
    looked_at, otherwise, seconds = 0, [], {}
    with closing(SQLStore(url, table=table)) as store:
        for verb in verbs.EVERYTHING:
            for watched in plans.watch(engine, table):
                prepared = verb.prepare(SQLStore(watched.engine, table=table))
                watched.seen.clear()
                began = time.monotonic()
                prepared()
                if verb.reads_all:
                    seconds[str(verb)] = time.monotonic() - began
                looked_at += len(watched.seen)
                otherwise += [
                    f"{verb}: {plan.statement}\n{plan.text}"
                    for plan in watched.seen
                    if not verb.reads_all
                    and not (
                        plan.indexes <= verb.indexes
                        and not plan.scans
                        and plan.sorts <= verb.sorts
                        and (plan.effort <= watched.little or "postgresql" in verb.reads_backlog)
                    )
                ]
                watched.engine.dispose()
                long_log.forget(store, verbs.USED, table)
    engine.dispose()
    return {"statements": looked_at, "otherwise": otherwise, "seconds of what reads all": seconds}
