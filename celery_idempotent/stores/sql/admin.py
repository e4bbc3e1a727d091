"""The operators' verbs besides reading: forget a row, count what may be purged, report the health of the log."""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import Table, delete, func, literal_column, null, or_, select, update

from celery_idempotent.core.records import FORGOTTEN, MAY_HAVE_RUN, LogHealth, MessageKey, ProcessedStatus, Row
from celery_idempotent.stores import took_effect
from celery_idempotent.stores.batches import in_batches
from celery_idempotent.stores.sql.clock import FromNow, Now, seconds
from celery_idempotent.stores.sql.columns import (
    DONE,
    FAILURE,
    PENDING,
    PROCESSING,
    Old,
    has_key,
    key_in,
    key_parameters,
    parameter,
    unneeded,
)
from celery_idempotent.stores.sql.connection import Attempt, Database
from celery_idempotent.stores.sql.direct import directly
from celery_idempotent.stores.sql.verbs import Verbs, verb, wrote

__all__ = ["Admin"]


class Admin(Verbs):
    """The verbs that forget rows, and report the health of the log and the settings of its server."""

    def __init__(self, table: Table, database: Database) -> None:
        super().__init__(table, database)
        self._admin = _Statements(table)

    @verb
    def forget(self, on: Attempt, row: Row) -> bool:
        parameters = {
            **key_parameters(row.key),
            "p_status": row.status.value,
            "p_token": row.token,
            "p_task_id": row.task_id,
        }
        return wrote(on, self._admin.forget, parameters) or (
            on.is_retry and self._shows(on, row.key, lambda found: took_effect.forget(found, row))
        )

    def erase(self, keys: Collection[MessageKey] | None = None) -> None:
        """Delete these rows, or all of them: for tests."""
        for some in [None] if keys is None else in_batches(keys):
            self._erase_some(some)

    @verb
    def _erase_some(self, on: Attempt, keys: Sequence[MessageKey] | None) -> None:
        if keys is None:
            on.connection.execute(self._admin.erase, {})
        else:
            on.connection.execute(delete(self._table).where(key_in(self._table, keys)))

    def purgeable(
        self,
        *,
        older_than: float,
        failures_older_than: float | None = None,
        task_name: str | None = None,
        processed_status: ProcessedStatus | None = None,
    ) -> int:
        chosen = Old(older_than, failures_older_than, task_name, processed_status)
        count = self._admin.purgeable.where(*chosen.conditions(self._table, self._dialect))
        return self._run(lambda on: on.connection.execute(count, chosen.parameters).scalar_one(), patient=True)

    def health(self) -> LogHealth:
        found = self._run(
            lambda on: on.connection.execute(self._admin.health).mappings().one(), prepared=False, patient=True
        )
        return LogHealth(**found)

    def configuration(self) -> Mapping[str, str]:
        if not self._database.exists():
            return {"file": str(self._database.engine.url.database)}
        settings = self._dialect.configuration
        found = self._run(lambda on: on.connection.execute(settings).all(), prepared=False)
        return {**{name: str(value) for name, value in found}, **self._database.of_bodies()}


class _Statements:
    """The statements of these verbs, for one table."""

    def __init__(self, table: Table) -> None:
        self.erase = directly(delete(table))
        self.forget = (
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
                # A purge goes by the time since the row was done.
                processed_timestamp=func.coalesce(table.c.processed_timestamp, Now()),
                lease_expires_at=null(),
                available_at=null(),
                expires_at=Now(),
                fingerprint=null(),
                message=null(),
                result=null(),
                steps=null(),
                error=literal_column(f"'{FORGOTTEN}'"),
            )
        )
        ended = table.c.processed_timestamp
        ago = FromNow(seconds("p_ago"))
        self.purgeable = select(func.count()).select_from(table).where(unneeded(table), ended <= ago)
        is_open = ended.is_(None)
        lease, published = table.c.lease_expires_at, table.c.published_at
        # Nobody is expected to publish what may have run without the guard.
        sure = or_(table.c.error.is_(None), table.c.error != literal_column(f"'{MAY_HAVE_RUN}'"))
        lapsed = (table.c.status == PROCESSING, lease <= Now(), or_(published.is_(None), published < lease), sure)
        unsent = (table.c.status == PENDING, published.is_(None), or_(lease.is_(None), lease <= Now()))
        self.health = select(
            Now().label("read_at"),
            select(func.max(table.c.available_at))
            .where(is_open, table.c.status == PENDING, published.is_not(None), table.c.available_at > Now())
            .scalar_subquery()
            .label("last_due"),
            select(func.min(lease)).where(is_open, *lapsed).scalar_subquery().label("lapsed_since"),
            select(func.min(table.c.created_timestamp)).where(is_open, *unsent).scalar_subquery().label("unsent_since"),
            # The first in the order of the index: MySQL and MariaDB would read the whole table for a minimum.
            select(ended)
            .where(unneeded(table), ended.is_not(None))
            .order_by(ended)
            .limit(1)
            .scalar_subquery()
            .label("done_since"),
        )
