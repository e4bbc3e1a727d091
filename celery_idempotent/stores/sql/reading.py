"""The verbs that only read: a row, rows, counts."""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from sqlalchemy import Table, func, or_, select

from celery_idempotent.core.records import FORGOTTEN, MessageKey, Row, RowFilter, Status, TaskCount
from celery_idempotent.stores.batches import in_batches
from celery_idempotent.stores.faults import statuses_of
from celery_idempotent.stores.sql.clock import FromNow, Now, seconds
from celery_idempotent.stores.sql.columns import key_in, matching, row_of
from celery_idempotent.stores.sql.connection import Attempt, Database
from celery_idempotent.stores.sql.dialects import Dialect
from celery_idempotent.stores.sql.verbs import Verbs, verb

__all__ = ["Reading"]

#: Columns that listings leave out: they can be large, and people read listings.
_LARGE = {"message", "result", "steps"}


class Reading(Verbs):
    """The verbs that find rows, list them and count them."""

    def __init__(self, table: Table, database: Database) -> None:
        super().__init__(table, database)
        self._reading = _Statements(table, database.dialect)

    @verb
    def find(self, on: Attempt, key: MessageKey) -> Row | None:
        return self._read(on.connection, key)

    def find_all(self, keys: Collection[MessageKey]) -> list[Row]:
        return [row for some in in_batches(keys) for row in self._find_some(some)]

    @verb
    def _find_some(self, on: Attempt, keys: Sequence[MessageKey]) -> list[Row]:
        these = self._reading.small.where(key_in(self._table, keys))
        return [row_of(read) for read in on.connection.execute(these).mappings()]

    def recorded(self, keys: Sequence[MessageKey]) -> Mapping[MessageKey, str]:
        return dict(found for some in in_batches(keys) for found in self._recorded_some(some))

    @verb
    def _recorded_some(self, on: Attempt, keys: Sequence[MessageKey]) -> list[tuple[MessageKey, str]]:
        these = self._reading.task_ids.where(key_in(self._table, keys))
        return [(MessageKey(*key), task_id) for *key, task_id in on.connection.execute(these)]

    def rows(self, where: RowFilter) -> Iterator[Row]:
        return iter(self._run(lambda on: self._rows(on, where), patient=True))

    def _rows(self, on: Attempt, where: RowFilter) -> list[Row]:
        table, dialect = self._table, self._dialect
        listed = (self._reading.oldest_first if where.oldest_first else self._reading.newest_first).limit(where.limit)
        if where.message_id is not None:
            listed = listed.where(matching(dialect, table.c.message_id, where.message_id))
        if where.task_name is not None:
            listed = listed.where(matching(dialect, table.c.task_name, where.task_name))
        if where.status is not None:
            listed = listed.where(table.c.status == where.status.value)
            if where.status is not Status.DONE:  # of which there is an index
                listed = listed.where(table.c.processed_timestamp.is_(None))
        if where.processed_status is not None:
            listed = listed.where(table.c.processed_status == where.processed_status.value, self._reading.remembered)
        if where.queue is not None:
            listed = listed.where(matching(dialect, table.c.queue, where.queue))
        if where.error is not None:
            listed = listed.where(matching(dialect, dialect.exact(table.c.error), where.error))
        ages: dict[str, float] = {}
        since = self._reading.since
        if where.older_than is not None:
            listed, ages["p_older"] = listed.where(since <= FromNow(seconds("p_older"))), -where.older_than
        if where.newer_than is not None:
            listed, ages["p_newer"] = listed.where(since > FromNow(seconds("p_newer"))), -where.newer_than
        return [row_of(read) for read in on.connection.execute(listed, ages).mappings()]

    @verb
    def newest(self, on: Attempt, *, limit: int) -> list[Row]:
        running = self._rows(on, RowFilter(status=Status.PROCESSING, limit=limit))
        ended = [row_of(read) for read in on.connection.execute(self._reading.ended.limit(limit)).mappings()]
        return sorted(running + ended, key=lambda row: row.created_timestamp, reverse=True)

    def counts(self) -> list[TaskCount]:
        found = self._run(lambda on: on.connection.execute(self._reading.counts).mappings().all(), patient=True)
        counts = [
            TaskCount(
                read["task_name"],
                *statuses_of(read["status"], read["processed_status"], of=(read["task_name"],)),
                rows=read["rows"],
                duplicates=int(read["duplicates"]),  # a sum is a Decimal to some drivers
            )
            for read in found
        ]
        # Here and not in SQL: collations and the place of nulls differ between databases.
        return sorted(counts, key=lambda count: (count.task_name, count.status, count.processed_status or ""))


class _Statements:
    """The statements of these verbs, for one table."""

    def __init__(self, table: Table, dialect: Dialect) -> None:
        small = select(*(column for column in table.c if column.name not in _LARGE), Now().label("read_at"))
        self.small = small
        recorded, key = table.c.created_timestamp, (table.c.message_id, table.c.task_name)
        self.newest_first = small.order_by(recorded.desc(), *key)
        self.oldest_first = small.order_by(recorded, *key)
        self.since = func.coalesce(table.c.processed_timestamp, recorded)
        self.ended = small.where(
            table.c.processed_timestamp.is_not(None),
            # Null if it ended without having run.
            table.c.worker.is_not(None),
        ).order_by(table.c.processed_timestamp.desc())
        self.task_ids = select(*key, table.c.task_id)
        error = dialect.exact(table.c.error)
        self.remembered = or_(error.is_(None), error != FORGOTTEN)
        kind = (table.c.task_name, table.c.status, table.c.processed_status)
        totals = (func.count().label("rows"), func.sum(table.c.duplicates).label("duplicates"))
        self.counts = select(*kind, *totals).where(self.remembered).group_by(*kind)
