"""The verbs of recovery: leases that ran out, messages that wait, rows past retention."""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Executable,
    Select,
    Table,
    and_,
    case,
    delete,
    func,
    literal_column,
    null,
    or_,
    select,
    union_all,
    update,
)

from celery_idempotent.core.records import MAY_HAVE_RUN, MessageKey, ProcessedStatus, Row
from celery_idempotent.core.store import LARGE_MESSAGE
from celery_idempotent.stores.batches import in_batches
from celery_idempotent.stores.sql.clock import FromNow, Now, seconds
from celery_idempotent.stores.sql.columns import (
    DONE,
    PENDING,
    PROCESSING,
    Old,
    has_key,
    key_in,
    key_parameters,
    parameter,
    row_of,
    unneeded,
)
from celery_idempotent.stores.sql.connection import Attempt, Database
from celery_idempotent.stores.sql.dialects import Dialect
from celery_idempotent.stores.sql.verbs import Verbs, verb, wrote

__all__ = ["Recovering"]

#: How many queues one statement reads.
_QUEUES_AT_ONCE = 50


class Recovering(Verbs):
    """The verbs that list what is due for recovery, and note what was done about it."""

    def __init__(self, table: Table, database: Database) -> None:
        super().__init__(table, database)
        self._recovering = _Statements(table, database.dialect)
        # The end of a purge's last batch, while there is more.
        self._purged_to: dict[Old, datetime] = {}

    @verb
    def lapsed(
        self,
        on: Attempt,
        *,
        again_after: float,
        limit: int,
        tasks: Collection[str] | None = None,
        doubted: bool = True,
    ) -> list[Row]:
        return _rows(on, self._of(self._recovering.lapsed, tasks, doubted=doubted).limit(limit), again_after)

    @verb
    def waiting(
        self,
        on: Attempt,
        *,
        older_than: float,
        limit: int,
        before: Mapping[str, datetime] | None = None,
        tasks: Collection[str] | None = None,
        doubted: bool = True,
    ) -> list[Row]:
        table, waiting = self._table, self._of(self._recovering.waiting, tasks, doubted=doubted).limit(limit)
        if before is not None:
            of_queues = [
                waiting.where(
                    table.c.queue == queue,
                    table.c.published_at < moment,
                    or_(table.c.available_at.is_(None), table.c.available_at < moment),
                )
                for queue, moment in before.items()
            ]
            rows: list[Row] = []
            for first in range(0, len(of_queues), _QUEUES_AT_ONCE):
                rows += _rows(on, _together(of_queues[first : first + _QUEUES_AT_ONCE]), older_than)
            return sorted(rows, key=_published)[:limit]
        # Queue by queue, each in the order of the index: otherwise the database would sort the whole backlog.
        rows = _rows(on, waiting.where(table.c.queue.is_(None)), older_than)
        for name in self._queues(on):
            rows += _rows(on, waiting.where(table.c.queue == name), older_than)
        return sorted(rows, key=_published)[:limit]

    @verb
    def unsent(self, on: Attempt, *, limit: int, tasks: Collection[str] | None = None) -> list[Row]:
        unsent = self._of(self._recovering.unsent, tasks).limit(limit)
        return [row_of(read) for read in on.connection.execute(unsent).mappings()]

    def _of(self, statement: Select[Any], tasks: Collection[str] | None, *, doubted: bool = True) -> Select[Any]:
        if tasks is not None:
            statement = statement.where(self._table.c.task_name.in_(sorted(tasks)))
        error = self._table.c.error
        return (
            statement
            if doubted
            else statement.where(or_(error.is_(None), error != literal_column(f"'{MAY_HAVE_RUN}'")))
        )

    @verb
    def relay(self, on: Attempt, row: Row, *, lease: float) -> bool:
        # A repeat cannot know whether its first attempt got the right to publish. If it did, the row is relayed after that has run out.
        return wrote(on, self._recovering.relay, {**key_parameters(row.key), "p_token": row.token, "p_lease": lease})

    def relayed(self, keys: Sequence[MessageKey], *, published: bool) -> None:
        for some in in_batches(keys):
            self._relayed_some(some, published=published)

    @verb
    def _relayed_some(self, on: Attempt, keys: Sequence[MessageKey], *, published: bool) -> None:
        these = self._recovering.relayed.where(key_in(self._table, keys))
        on.connection.execute(these, {"p_published": 0.0 if published else None})

    @verb
    def not_published(self, on: Attempt, key: MessageKey, *, token: int) -> None:
        on.connection.execute(self._recovering.not_published, {**key_parameters(key), "p_token": token})

    def doubt(self, keys: Sequence[MessageKey]) -> None:
        for some in in_batches(keys):
            self._doubt_some(some)

    @verb
    def _doubt_some(self, on: Attempt, keys: Sequence[MessageKey]) -> None:
        on.connection.execute(self._recovering.doubt.where(key_in(self._table, keys)))

    @verb
    def purge(
        self,
        on: Attempt,
        *,
        older_than: float,
        limit: int,
        failures_older_than: float | None = None,
        task_name: str | None = None,
        processed_status: ProcessedStatus | None = None,
    ) -> int:
        # Deleted by their keys: not every database has a limit on DELETE.
        #
        # A batch begins where the last full one ended. Its deleted rows stay in the index until the table is vacuumed, and
        # what its ``expires_at`` keeps stays: read again by each batch, either would make a purge of millions take ever longer.
        chosen = Old(older_than, failures_older_than, task_name, processed_status)
        conditions, parameters = chosen.conditions(self._table, self._dialect), chosen.parameters
        statements, since, old = self._recovering, self._purged_to.get(chosen), list[Any]()
        if since is not None:
            rest = statements.old_from.where(*conditions).limit(limit)
            old += on.connection.execute(rest, {**parameters, "p_processed_timestamp": since})
        if len(old) < limit:  # from the beginning: rows kept there may have become free since
            old = list(on.connection.execute(statements.old.where(*conditions).limit(limit), parameters))
        self._purged_to = {chosen: old[-1].processed_timestamp} if len(old) == limit else {}
        if not old:
            return 0
        keys = [MessageKey(row.message_id, row.task_name) for row in old]
        chosen_keys = statements.delete.where(*conditions).where(key_in(self._table, keys))
        return on.connection.execute(chosen_keys, parameters).rowcount

    def _queues(self, on: Attempt) -> Iterator[str]:
        """Yield the queues that pending rows wait on."""
        name: str | None = on.connection.execute(self._recovering.first_queue).scalar()
        while name is not None:
            yield name
            name = on.connection.execute(self._recovering.next_queue, {"p_queue": name}).scalar()


def _rows(on: Attempt, statement: Executable, ago: float) -> list[Row]:
    return [row_of(read) for read in on.connection.execute(statement, {"p_ago": -ago}).mappings()]


def _listed(table: Table) -> list[ColumnElement[Any]]:
    """Return the columns of listed rows: no results, and no large messages."""
    message = case((func.length(table.c.message) <= literal_column(str(LARGE_MESSAGE)), table.c.message), else_=null())
    small = [column for column in table.c if column.name not in ("message", "result", "steps")]
    return [*small, message.label("message")]


def _together(of_queues: Sequence[Select[Any]]) -> Executable:
    """Return one statement for several limited ones, each executed as it would be alone."""
    if len(of_queues) == 1:
        return of_queues[0]
    return union_all(*(select(each.subquery()) for each in of_queues))


def _published(row: Row) -> datetime:
    assert row.published_at is not None  # which was asked for
    return row.published_at


class _Statements:
    """The statements of these verbs, for one table; each finds its rows together in one index."""

    def __init__(self, table: Table, dialect: Dialect) -> None:
        ago = FromNow(seconds("p_ago"))
        # There is an index on what is not done; by this condition the databases know that they can use it.
        read = select(*_listed(table), Now().label("read_at")).where(table.c.processed_timestamp.is_(None))
        self.lapsed = (
            read.where(
                table.c.status == PROCESSING,
                table.c.lease_expires_at <= Now(),
                or_(
                    table.c.published_at.is_(None),
                    table.c.published_at < table.c.lease_expires_at,
                    table.c.published_at <= ago,
                ),
            )
            # Sorting is cheap: there are only as many processing rows as running messages.
            .order_by(table.c.lease_expires_at)
        )
        self.waiting = read.where(
            table.c.status == PENDING,
            table.c.published_at <= ago,
            or_(table.c.available_at.is_(None), table.c.available_at <= ago),
        ).order_by(table.c.published_at)
        # The first queue with pending rows, or the next one: the index leads from each to the next, past what waits on it.
        self.first_queue = select(func.min(table.c.queue)).where(
            table.c.processed_timestamp.is_(None), table.c.status == PENDING
        )
        self.next_queue = self.first_queue.where(table.c.queue > parameter(table, "queue"))
        # Not done and not processing means pending. In this form, no database searches all pending rows for them.
        unsent = (table.c.status != PROCESSING, table.c.published_at.is_(None))
        tie = () if dialect.recorded_order is None else (dialect.recorded_order,)
        self.unsent = read.where(*unsent).order_by(table.c.created_timestamp, *tie)
        self.relay = (
            update(table)
            .where(
                has_key(table),
                table.c.status == PENDING,
                table.c.published_at.is_(None),
                table.c.token == parameter(table, "token"),
                or_(table.c.lease_expires_at.is_(None), table.c.lease_expires_at <= Now()),
            )
            .values(lease_expires_at=FromNow(seconds("p_lease")))
        )
        # The lease of a running row is its owner's.
        self.relayed = (
            update(table)
            .where(table.c.status == PENDING, table.c.published_at.is_(None))
            .values(published_at=FromNow(seconds("p_published")), lease_expires_at=null())
        )
        self.not_published = (
            update(table)
            .where(has_key(table), table.c.status != DONE, table.c.token == parameter(table, "token"))
            .values(published_at=null())
        )
        waits = and_(table.c.status == PENDING, table.c.published_at.is_not(None))
        ownerless = and_(
            table.c.status == PROCESSING, table.c.processed_status.is_(None), table.c.lease_expires_at <= Now()
        )
        self.doubt = (
            update(table)
            .where(table.c.error.is_(None), or_(waits, ownerless))
            .values(error=literal_column(f"'{MAY_HAVE_RUN}'"))
        )
        self.old = (
            select(table.c.message_id, table.c.task_name, table.c.processed_timestamp)
            .where(table.c.processed_timestamp <= ago, unneeded(table))
            .order_by(table.c.processed_timestamp)
        )
        self.old_from = self.old.where(table.c.processed_timestamp >= parameter(table, "processed_timestamp"))
        self.delete = delete(table).where(table.c.processed_timestamp <= ago, unneeded(table))
