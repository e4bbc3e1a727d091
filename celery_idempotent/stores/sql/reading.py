"""What operators read: a row, rows, counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import Connection, Table, func, or_, select

from celery_idempotent.core.records import FORGOTTEN, MessageKey, Row, RowFilter, Status, TaskCount
from celery_idempotent.stores.sql.clock import FromNow, Now, seconds
from celery_idempotent.stores.sql.columns import AT_ONCE, Lookup, key_in, matching, row_of, statuses_of
from celery_idempotent.stores.sql.dialects import Dialect

__all__ = ["Reading"]

#: Left out of listings: they can be large, and a listing is for people.
_LARGE = {"message", "result"}


class Reading:
    """Statements that only read, for one table."""

    def __init__(self, table: Table, dialect: Dialect) -> None:
        self._table = table
        self._dialect = dialect
        self._read = Lookup(table)
        small = select(*(column for column in table.c if column.name not in _LARGE), Now().label("read_at"))
        self._small = small
        recorded, key = table.c.created_timestamp, (table.c.message_id, table.c.task_name)
        self._newest_first = small.order_by(recorded.desc(), *key)
        self._oldest_first = small.order_by(recorded, *key)
        self._since = func.coalesce(table.c.processed_timestamp, recorded)
        self._ended = small.where(
            table.c.processed_timestamp.is_not(None),
            # Null if it ended without having run.
            table.c.worker.is_not(None),
        ).order_by(table.c.processed_timestamp.desc())
        self._task_ids = select(*key, table.c.task_id)
        error = dialect.exact(table.c.error)
        self._remembered = or_(error.is_(None), error != FORGOTTEN)
        kind = (table.c.task_name, table.c.status, table.c.processed_status)
        totals = (func.count().label("rows"), func.sum(table.c.duplicates).label("duplicates"))
        self._counts = select(*kind, *totals).where(self._remembered).group_by(*kind)

    def find(self, connection: Connection, key: MessageKey) -> Row | None:
        """Return the row of a message."""
        return self._read(connection, key)

    def task_ids(self, connection: Connection, keys: Sequence[MessageKey]) -> dict[MessageKey, str]:
        """Return the Celery task ids of the rows that are there."""
        found: dict[MessageKey, str] = {}
        for first in range(0, len(keys), AT_ONCE):
            some = self._task_ids.where(key_in(self._table, keys[first : first + AT_ONCE]))
            found.update({MessageKey(*key): task_id for *key, task_id in connection.execute(some)})
        return found

    def find_all(self, connection: Connection, keys: Collection[MessageKey]) -> list[Row]:
        """Those that are there, without what is large."""
        every, found = list(keys), list[Row]()
        for first in range(0, len(every), AT_ONCE):
            these = self._small.where(key_in(self._table, every[first : first + AT_ONCE]))
            found += [row_of(read) for read in connection.execute(these).mappings()]
        return found

    def rows(self, connection: Connection, where: RowFilter) -> list[Row]:
        """Rows that match, in the order asked for, without what is large."""
        listed = (self._oldest_first if where.oldest_first else self._newest_first).limit(where.limit)
        if where.message_id is not None:
            listed = listed.where(matching(self._dialect, self._table.c.message_id, where.message_id))
        if where.task_name is not None:
            listed = listed.where(matching(self._dialect, self._table.c.task_name, where.task_name))
        if where.status is not None:
            listed = listed.where(self._table.c.status == where.status.value)
            if where.status is not Status.DONE:  # of which there is an index
                listed = listed.where(self._table.c.processed_timestamp.is_(None))
        if where.processed_status is not None:
            listed = listed.where(self._table.c.processed_status == where.processed_status.value, self._remembered)
        if where.queue is not None:
            listed = listed.where(matching(self._dialect, self._table.c.queue, where.queue))
        if where.error is not None:
            listed = listed.where(matching(self._dialect, self._dialect.exact(self._table.c.error), where.error))
        ages: dict[str, float] = {}
        if where.older_than is not None:
            listed, ages["p_older"] = listed.where(self._since <= FromNow(seconds("p_older"))), -where.older_than
        if where.newer_than is not None:
            listed, ages["p_newer"] = listed.where(self._since > FromNow(seconds("p_newer"))), -where.newer_than
        return [row_of(read) for read in connection.execute(listed, ages).mappings()]

    def newest(self, connection: Connection, *, limit: int) -> list[Row]:
        """Rows that were claimed, of either end of what there is an index of."""
        running = self.rows(connection, RowFilter(status=Status.PROCESSING, limit=limit))
        ended = [row_of(read) for read in connection.execute(self._ended.limit(limit)).mappings()]
        return sorted(running + ended, key=lambda row: row.created_timestamp, reverse=True)

    def counts(self, connection: Connection) -> list[TaskCount]:
        """How many rows stand where."""
        counts = [
            # A sum is a Decimal to some drivers.
            TaskCount(read["task_name"], *statuses_of(read), rows=read["rows"], duplicates=int(read["duplicates"]))
            for read in connection.execute(self._counts).mappings()
        ]
        # Here and not in SQL: collations and the place of nulls differ between databases.
        return sorted(counts, key=lambda count: (count.task_name, count.status, count.processed_status or ""))
