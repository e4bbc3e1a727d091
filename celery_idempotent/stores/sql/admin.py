"""What operators ask for besides reading: forget a row, count what may be purged, tell how the log and its server stand."""

from __future__ import annotations

from sqlalchemy import Connection, Table, func, literal_column, null, or_, select, update

from celery_idempotent.core.records import FORGOTTEN, LogHealth, ProcessedStatus, Row, Status
from celery_idempotent.stores.sql.clock import FromNow, Now, seconds
from celery_idempotent.stores.sql.columns import (
    DONE,
    FAILURE,
    PENDING,
    PROCESSING,
    Lookup,
    Old,
    has_key,
    key_parameters,
    parameter,
    unneeded,
)
from celery_idempotent.stores.sql.dialects import Dialect

__all__ = ["Admin"]


class Admin:
    """Statements for operators, for one table."""

    def __init__(self, table: Table, dialect: Dialect) -> None:
        self._table, self._dialect = table, dialect
        self._read = Lookup(table)
        self._forget = (
            update(table)
            .where(
                has_key(table),
                table.c.status == parameter(table, "status"),
                table.c.token == parameter(table, "token"),
                table.c.task_id == parameter(table, "task_id"),
            )
            .values(
                status=DONE,
                processed_status=FAILURE,
                # How long ago it was done counts, for a purge.
                processed_timestamp=func.coalesce(table.c.processed_timestamp, Now()),
                lease_expires_at=null(),
                available_at=null(),
                expires_at=Now(),
                fingerprint=null(),
                message=null(),
                result=null(),
                error=literal_column(f"'{FORGOTTEN}'"),
            )
        )
        ended = table.c.processed_timestamp
        ago = FromNow(seconds("p_ago"))
        self._purgeable = select(func.count()).select_from(table).where(unneeded(table), ended <= ago)
        is_open = ended.is_(None)
        lease, published = table.c.lease_expires_at, table.c.published_at
        lapsed = (table.c.status == PROCESSING, lease <= Now(), or_(published.is_(None), published < lease))
        unsent = (table.c.status == PENDING, published.is_(None), or_(lease.is_(None), lease <= Now()))
        self._condition = select(
            Now().label("read_at"),
            select(func.max(table.c.available_at))
            .where(is_open, table.c.status == PENDING, published.is_not(None), table.c.available_at > Now())
            .scalar_subquery()
            .label("last_due"),
            select(func.min(lease)).where(is_open, *lapsed).scalar_subquery().label("lapsed_since"),
            select(func.min(table.c.created_timestamp)).where(is_open, *unsent).scalar_subquery().label("unsent_since"),
            # In the order of the index, as far as the first: MySQL and MariaDB read the whole table for the least of them.
            select(ended)
            .where(unneeded(table), ended.is_not(None))
            .order_by(ended)
            .limit(1)
            .scalar_subquery()
            .label("done_since"),
        )

    def forget(self, connection: Connection, row: Row, *, is_retry: bool) -> bool:
        """Empty it and free its id, by compare and set."""
        parameters = {
            **key_parameters(row.key),
            "p_status": row.status.value,
            "p_token": row.token,
            "p_task_id": row.task_id,
        }
        if connection.execute(self._forget, parameters).rowcount:
            return True
        if not is_retry:
            return False
        found = self._read(connection, row.key)
        return (
            found is not None
            and (found.status, found.processed_status) == (Status.DONE, ProcessedStatus.FAILURE)
            and (found.token, found.task_id, found.error) == (row.token, row.task_id, FORGOTTEN)
        )

    def purgeable(self, connection: Connection, chosen: Old) -> int:
        """How many rows are past retention."""
        conditions = chosen.conditions(self._table, self._dialect)
        counted: int = connection.execute(self._purgeable.where(*conditions), chosen.parameters).scalar_one()
        return counted

    def condition(self, connection: Connection) -> LogHealth:
        """Return what waits, and since when."""
        return LogHealth(**connection.execute(self._condition).mappings().one())
