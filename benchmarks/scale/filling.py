"""A queue log as weeks of traffic leave it: each row recorded, claimed and completed, by set, a thousand in flight."""

from __future__ import annotations

import time
from dataclasses import dataclass

import sqlalchemy as sa

from celery_idempotent.message.serialization import encode_message
from celery_idempotent.stores.sql import SQLStore

__all__ = ["IN_FLIGHT", "Filling", "fill"]

#: Messages that are recorded together, then claimed together, then completed together.
IN_FLIGHT = 1000

#: A week of traffic, which retention keeps.
_WEEK = 7 * 24 * 3600.0

#: The message of a call with an id, a sum and a few words, as the library writes it.
_MESSAGE = encode_message(
    (
        "o-0000000000",
        500,
        {"currency": "EUR", "customer": "c-48213", "note": "gift wrapped, leave with the neighbours"},
    ),
    {"retry": True},
    {"queue": "celery", "routing_key": "celery", "exchange": ""},
    serializer="json",
)

#: Of a thousand messages five still wait (on a queue that is slow), ten have failed, one in fifty thousand runs. Half have an id of
#: their own, the others are known by their task id. Of a hundred results ninety are a word, nine some hundred bytes, one some thousand.
_PROCEDURE = """
CREATE OR REPLACE PROCEDURE live_{table}(first bigint, last bigint, total bigint) LANGUAGE plpgsql AS $$
DECLARE
    ids text[];
    began timestamptz := statement_timestamp() - {week} * INTERVAL '1 second';
    apart interval := {week} * INTERVAL '1 second' / total;
BEGIN
    FOR batch IN first..last BY {in_flight} LOOP
        ids := ARRAY(
            SELECT CASE WHEN n % 2 = 0 THEN 'order:' || to_char(n, 'FM0000000000') ELSE gen_random_uuid()::text END
            FROM generate_series(batch, batch + {in_flight} - 1) AS n ORDER BY n);
        INSERT INTO {table} (message_id, task_name, status, created_timestamp, task_id, queue, fingerprint, attempt, token,
            published_at, duplicates, takeovers, message)
        SELECT id, 'shop.orders.task_' || n % 5, 'pending', began + n * apart,
            CASE WHEN n % 2 = 0 THEN gen_random_uuid()::text ELSE id END,
            CASE WHEN n % 1000 < 5 THEN 'slow' ELSE 'celery' END,
            CASE WHEN n % 2 = 0 THEN encode(sha256(id::bytea), 'hex') END,
            0, 0, began + n * apart, 0, 0, convert_to(replace({message}, '0000000000', to_char(n, 'FM0000000000')), 'UTF8')
        FROM unnest(ids) WITH ORDINALITY AS message (id, place), LATERAL (SELECT batch + place - 1 AS n) AS number;
        COMMIT;
        UPDATE {table} SET status = 'processing', worker = 'worker-7.shop.example:' || 20000 + place % 40, ran_task_id = task_id,
            lease_expires_at = statement_timestamp() + INTERVAL '1 minute', token = token + 1, processed_status = NULL, error = NULL,
            available_at = NULL, takeovers = 0
        FROM unnest(ids) WITH ORDINALITY AS message (id, place)
        WHERE message_id = id AND queue = 'celery';
        COMMIT;
        UPDATE {table} SET status = 'done', processed_timestamp = began + (n + 3000) * apart, lease_expires_at = NULL,
            processed_status = CASE WHEN failed THEN 'failure' ELSE 'success' END,
            message = CASE WHEN failed THEN message END,
            error = CASE WHEN failed THEN 'requests.exceptions.ConnectionError: bank.example did not answer within 30 s' END,
            result = CASE WHEN failed THEN NULL
                WHEN n % 100 = 50 THEN convert_to(
                    (SELECT '"' || string_agg(md5(random()::text), '') || '"' FROM generate_series(1, 120 + n % 100)), 'UTF8')
                WHEN n % 100 < 10 THEN convert_to(
                    (SELECT '"' || string_agg(md5(random()::text), '') || '"' FROM generate_series(1, 12)), 'UTF8')
                ELSE convert_to('{{"charged": ' || n % 1000 || ', "receipt": "r-' || n || '"}}', 'UTF8') END
        FROM unnest(ids) WITH ORDINALITY AS message (id, place),
            LATERAL (SELECT batch + place - 1 AS n) AS number, LATERAL (SELECT n % 1000 BETWEEN 5 AND 14 AS failed) AS outcome
        WHERE message_id = id AND status = 'processing' AND n % 50000 <> 777;
        COMMIT;
    END LOOP;
END $$
"""


@dataclass(frozen=True, slots=True)
class Filling:
    """How far the filling came.

    Attributes:
        rows: Rows that are there.
        seconds: Seconds that this call took.
    """

    rows: int
    seconds: float


def fill(connection: sa.Connection, url: str, table: str, rows: int, *, within: float = float("inf")) -> Filling:
    """Fill a table, made as ``idempotent init`` makes it, to so many rows; what is there of an earlier filling stays.

    Args:
        connection: In autocommit: the procedure commits.
        url: The same database.
        table: The table's name.
        rows: A multiple of :data:`IN_FLIGHT`.
        within: Seconds after which it stops, however far it came.
    """
    store = SQLStore(url, table=table)
    store.init()
    store.close()
    message = str(sa.literal(_MESSAGE.decode()).compile(compile_kwargs={"literal_binds": True}))
    procedure = _PROCEDURE.format(table=table, week=_WEEK, in_flight=IN_FLIGHT, message=message)
    connection.exec_driver_sql(procedure.replace("%", "%%"))
    began = time.monotonic()
    there = connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one()
    step = 20 * IN_FLIGHT
    while there < rows and time.monotonic() - began < within:
        last = min(there + step, rows)
        connection.exec_driver_sql(f"CALL live_{table}({there}, {last - 1}, {rows})")
        there = last
    if there == rows:
        connection.exec_driver_sql(f"VACUUM ANALYZE {table}")
    return Filling(there, time.monotonic() - began)
