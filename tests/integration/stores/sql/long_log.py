"""A log that is long: some hundred thousand rows, of which nearly all are done, made in seconds by the database itself."""

from __future__ import annotations

import sqlalchemy as sa

from celery_idempotent.stores.sql import SQLStore

__all__ = ["DONE", "PENDING", "QUEUES", "RUNNING", "UNSENT", "fill", "forget"]

#: How many rows are how. Enough that every planner prefers an index wherever one serves, as it does for ten million.
DONE, PENDING, RUNNING, UNSENT = 300_000, 20_000, 50, 50

#: The queues that messages wait on.
QUEUES = ("fast", "mail", "slow")

#: What a row of each kind has, by its number ``n``; other columns are null. The moments are those of a week and more.
_EVERY = {
    **dict.fromkeys(("message_id", "task_id"), "{id}"),
    "task_name": "'shop.task'",
    "created_timestamp": "{at}",
    **dict.fromkeys(("attempt", "duplicates", "takeovers"), "0"),
}
_PENDING = {**_EVERY, "status": "'pending'", "token": "0", "message": "{message}"}
_CLAIMED = {
    **_EVERY,
    "token": "1",
    "worker": "'worker:1'",
    "ran_task_id": "{id}",
    "queue": "'fast'",
    "published_at": "{at}",
}
_KINDS = (
    (
        DONE,
        {
            **_CLAIMED,
            "status": "'done'",
            "processed_status": "'success'",
            "processed_timestamp": "{later}",
            "result": "{result}",
        },
    ),
    (
        PENDING,
        {
            **_PENDING,
            "queue": "CASE n % 10 WHEN 0 THEN 'fast' WHEN 1 THEN 'mail' ELSE 'slow' END",
            "published_at": "{at}",
        },
    ),
    (RUNNING, {**_CLAIMED, "status": "'processing'", "lease_expires_at": "{at}", "message": "{message}"}),
    (UNSENT, {**_PENDING, "queue": "'mail'"}),
)

_PARTS = {
    "postgresql": {
        # Spread all over the key, as ids are.
        "id": "md5(n::text)",
        "at": "statement_timestamp() - INTERVAL '8 days' + n * INTERVAL '2 seconds'",
        "later": "statement_timestamp() - INTERVAL '8 days' + n * INTERVAL '2 seconds' + INTERVAL '1 minute'",
        "bytes": "'{}'::bytea",
        "series": "SELECT n FROM generate_series({first}, {last}) AS n",
    },
    "mysql": {
        "id": "md5(n)",
        "at": "UTC_TIMESTAMP(6) - INTERVAL 8 DAY + INTERVAL 2 * n SECOND",
        "later": "UTC_TIMESTAMP(6) - INTERVAL 8 DAY + INTERVAL 2 * n + 60 SECOND",
        "bytes": "'{}'",
        "series": "SELECT seq AS n FROM seq_{first}_to_{last}",
    },
    "sqlite": {
        # The golden ratio's multiples modulo a prime: every number once, in no order.
        "id": "printf('%010d', n * 1618033989 % 4294967291)",
        "at": "strftime('%Y-%m-%d %H:%M:%f000', 'now', '-8 days', (2 * n) || ' seconds')",
        "later": "strftime('%Y-%m-%d %H:%M:%f000', 'now', '-8 days', (2 * n + 60) || ' seconds')",
        "bytes": "CAST('{}' AS BLOB)",
        "series": "WITH RECURSIVE counted (n) AS (SELECT {first} UNION ALL SELECT n + 1 FROM counted WHERE n < {last}) SELECT n FROM counted",
    },
}

_ANALYZE = {"postgresql": "VACUUM ANALYZE {}", "mysql": "ANALYZE TABLE {}", "sqlite": "ANALYZE"}


def fill(store: SQLStore, table: str = "queue_log") -> None:
    """Fill its table, which is there and empty, and have the planner know it."""
    parts = _PARTS[store.engine.dialect.name]
    values = {
        **{name: parts[name] for name in ("id", "at", "later")},
        "message": parts["bytes"].format('{"args": [' + "1, " * 60 + "1]}"),
        "result": parts["bytes"].format('{"receipt": "r-1"}'),
    }
    with store.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        first = 1
        for count, kind in _KINDS:
            numbers = parts["series"].format(first=first, last=first + count - 1)
            text = (
                f"INSERT INTO {table} ({', '.join(kind)}) SELECT {', '.join(kind.values())} FROM ({numbers}) AS numbers"
            )
            # As text, whose percent signs are the driver's affair.
            connection.execute(sa.text(_substituted(text, values).replace(":", "\\:")))
            first += count
        connection.execute(sa.text(_ANALYZE[connection.dialect.name].format(table)))


def _substituted(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def forget(store: SQLStore, message_ids: list[str], table: str = "queue_log") -> None:
    """Delete what a test has left."""
    column = sa.column("message_id", sa.String)
    with store.engine.begin() as connection:
        connection.execute(sa.delete(sa.table(table, column)).where(column.in_(message_ids)))
