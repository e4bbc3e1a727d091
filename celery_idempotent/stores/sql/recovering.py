"""What recovery asks for: leases that ran out, messages that wait, rows past retention."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, Table, delete, null, or_, select, tuple_, update

from celery_idempotent.records import MessageKey, Row
from celery_idempotent.stores.sql.clock import FromNow, Now, seconds
from celery_idempotent.stores.sql.columns import (
    DONE,
    PENDING,
    PROCESSING,
    has_key,
    key_parameters,
    parameter,
    row_of,
)

__all__ = ["Recovering"]


class Recovering:
    """Statements of the recovery step, for one table; each reads one index from its old end."""

    def __init__(self, table: Table) -> None:
        self._table = table
        ago = FromNow(seconds("p_ago"))
        read = select(table, Now().label("read_at"))
        self._lapsed = (
            read.where(
                table.c.status == PROCESSING,
                table.c.lease_expires_at <= Now(),
                or_(
                    table.c.published_at.is_(None),
                    table.c.published_at < table.c.lease_expires_at,
                    table.c.published_at <= ago,
                ),
            )
            # An ending lease is what the index is over.
            .order_by(table.c.lease_expires_at)
        )
        self._waiting = read.where(
            table.c.status == PENDING,
            table.c.published_at <= ago,
            or_(table.c.available_at.is_(None), table.c.available_at <= ago),
        ).order_by(table.c.published_at)
        self._unsent = read.where(table.c.status == PENDING, table.c.published_at.is_(None)).order_by(
            table.c.created_timestamp
        )
        self._not_published = (
            update(table)
            .where(has_key(table), table.c.status != DONE, table.c.token == parameter(table, "token"))
            .values(published_at=null())
        )
        self._key = tuple_(table.c.message_id, table.c.task_name)
        # An id that is to stay taken for longer than retention keeps its row.
        unneeded = or_(table.c.expires_at.is_(None), table.c.expires_at <= Now())
        self._old = (
            select(table.c.message_id, table.c.task_name)
            .where(table.c.status == DONE, table.c.processed_timestamp <= ago, unneeded)
            .order_by(table.c.processed_timestamp)
        )
        self._delete = delete(table).where(table.c.status == DONE, table.c.processed_timestamp <= ago, unneeded)

    def lapsed(self, connection: Connection, *, again_after: float, limit: int) -> list[Row]:
        """Processing, its lease run out."""
        return self._rows(connection, self._lapsed.limit(limit), again_after)

    def waiting(
        self, connection: Connection, *, older_than: float, limit: int, queue: str | None, before: datetime | None
    ) -> list[Row]:
        """Pending for a while."""
        waiting, table = self._waiting, self._table
        if queue is not None:
            waiting = waiting.where(table.c.queue == queue)
        if before is not None:
            waiting = waiting.where(
                table.c.published_at < before,
                or_(table.c.available_at.is_(None), table.c.available_at < before),
            )
        return self._rows(connection, waiting.limit(limit), older_than)

    def unsent(self, connection: Connection, *, limit: int) -> list[Row]:
        """Pending, never published."""
        return [row_of(read) for read in connection.execute(self._unsent.limit(limit)).mappings()]

    def not_published(self, connection: Connection, key: MessageKey, *, token: int) -> None:
        """It was not handed to the broker after all."""
        connection.execute(self._not_published, {**key_parameters(key), "p_token": token})

    def purge(self, connection: Connection, *, older_than: float, limit: int) -> int:
        """Delete what is done and past retention, by its keys: a limit on DELETE is not everywhere."""
        parameters = {"p_ago": -older_than}
        keys = [tuple(key) for key in connection.execute(self._old.limit(limit), parameters)]
        if not keys:
            return 0
        return connection.execute(self._delete.where(self._key.in_(keys)), parameters).rowcount

    def _rows(self, connection: Connection, statement: Select[Any], ago: float) -> list[Row]:
        return [row_of(read) for read in connection.execute(statement, {"p_ago": -ago}).mappings()]
