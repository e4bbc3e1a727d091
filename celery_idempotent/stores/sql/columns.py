"""The common parts of statements: conditions, values and parameters over the table's columns, and rows read back.

Statements are built once per store and reused; a call only adds parameters. These are named ``p_<column>``, because one with
a column's own name would become part of the ``SET`` clause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    String,
    Table,
    and_,
    bindparam,
    literal_column,
    null,
    or_,
    select,
    tuple_,
)

from celery_idempotent.core.records import Claim, Holder, MessageKey, NewMessage, ProcessedStatus, Row, Status
from celery_idempotent.stores.faults import statuses_of
from celery_idempotent.stores.sql.clock import FromNow, Now, seconds
from celery_idempotent.stores.sql.dialects import Dialect

__all__ = [
    "DONE",
    "FAILURE",
    "PENDING",
    "PROCESSING",
    "SUCCESS",
    "Lookup",
    "Old",
    "free_again",
    "has_key",
    "holder_parameters",
    "initial_values",
    "key_in",
    "key_parameters",
    "matching",
    "message_parameters",
    "new_key",
    "parameter",
    "row_of",
    "unneeded",
]


def _word(value: Status | ProcessedStatus) -> ColumnElement[str]:
    """Return a status as text in the SQL, not as a parameter, so that the planner sees it."""
    return literal_column(f"'{value.value}'", String())


PENDING, PROCESSING, DONE = _word(Status.PENDING), _word(Status.PROCESSING), _word(Status.DONE)
SUCCESS, FAILURE = _word(ProcessedStatus.SUCCESS), _word(ProcessedStatus.FAILURE)


def parameter(table: Table, column: str) -> BindParameter[Any]:
    """Return the parameter of a column, of its type."""
    return bindparam(f"p_{column}", type_=table.c[column].type)


# -- conditions --------------------------------------------------------------------------------------------------------


def has_key(table: Table) -> ColumnElement[bool]:
    """Match the row of the message."""
    return and_(
        table.c.message_id == parameter(table, "message_id"),
        table.c.task_name == parameter(table, "task_name"),
    )


def key_in(table: Table, keys: Iterable[MessageKey]) -> ColumnElement[bool]:
    """Match the rows of some hundreds of messages at most."""
    named = [(key.message_id, key.task_name) for key in keys]
    return and_(
        # First by the ids alone, since SQLite reads the whole table for pairs; then compare both columns.
        table.c.message_id.in_([message_id for message_id, _ in named]),
        tuple_(table.c.message_id, table.c.task_name).in_(named),
    )


def unneeded(table: Table) -> ColumnElement[bool]:
    """Match rows that are old enough to purge: done, and with an id that need not stay taken for longer than retention."""
    return and_(table.c.status == DONE, or_(table.c.expires_at.is_(None), table.c.expires_at <= Now()))


@dataclass(frozen=True, slots=True)
class Old:
    """The rows that a purge deletes; see ``Store.purge``."""

    older_than: float
    failures_older_than: float | None = None
    task_name: str | None = None
    processed_status: ProcessedStatus | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of :meth:`conditions`, and ``p_ago``."""
        parameters: dict[str, Any] = {"p_ago": -self.older_than}
        if self._keeps_failures:
            parameters["p_failures_ago"] = -(self.failures_older_than or 0.0)
        return parameters

    def conditions(self, table: Table, dialect: Dialect) -> list[ColumnElement[bool]]:
        """Return the conditions other than the age."""
        found: list[ColumnElement[bool]] = []
        if self._keeps_failures:
            # A row without its message, as after `forget`, cannot be requeued.
            found.append(
                or_(
                    table.c.processed_status != FAILURE,
                    table.c.message.is_(None),
                    table.c.processed_timestamp <= FromNow(seconds("p_failures_ago")),
                )
            )
        if self.task_name is not None:
            found.append(matching(dialect, table.c.task_name, self.task_name))
        if self.processed_status is not None:
            found.append(table.c.processed_status == self.processed_status.value)
        return found

    @property
    def _keeps_failures(self) -> bool:
        return self.failures_older_than is not None and self.failures_older_than > self.older_than


def matching(dialect: Dialect, column: ColumnElement[str], pattern: str) -> ColumnElement[bool]:
    """Match the text, or the pattern with ``*`` and ``?``."""
    return dialect.like(column, pattern) if "*" in pattern or "?" in pattern else column == pattern


def free_again(table: Table) -> ColumnElement[bool]:
    """Match rows whose id a new message may take."""
    return and_(table.c.status == DONE, table.c.expires_at <= Now())


# -- values ------------------------------------------------------------------------------------------------------------


def new_key(table: Table) -> dict[str, Any]:
    """Return the columns that a row keeps when it is started again: its key."""
    return {"message_id": parameter(table, "message_id"), "task_name": parameter(table, "task_name")}


def initial_values(table: Table) -> dict[str, Any]:
    """Every other column but the token, as a message is recorded."""
    return {
        "status": PENDING,
        "processed_status": null(),
        "created_timestamp": Now(),
        "processed_timestamp": null(),
        **{name: parameter(table, name) for name in ("task_id", "queue", "fingerprint", "attempt", "message")},
        "worker": null(),
        # For a row of the outbox: until then, only its recorder publishes it.
        "lease_expires_at": FromNow(seconds("p_publish_within")),
        "available_at": FromNow(seconds("p_delay")),
        "published_at": FromNow(seconds("p_published")),
        "expires_at": null(),
        "duplicates": literal_column("0"),
        "takeovers": literal_column("0"),
        "ran_task_id": null(),
        "result": null(),
        "steps": null(),
        "error": null(),
    }


# -- parameters --------------------------------------------------------------------------------------------------------


def key_parameters(key: MessageKey) -> dict[str, Any]:
    """Parameters of :func:`has_key`."""
    return {"p_message_id": key.message_id, "p_task_name": key.task_name}


def message_parameters(message: NewMessage) -> dict[str, Any]:
    """Parameters of :func:`has_key` and :func:`initial_values`."""
    return {
        "p_message_id": message.key.message_id,
        "p_task_name": message.key.task_name,
        "p_task_id": message.task_id,
        "p_queue": message.queue,
        "p_fingerprint": message.fingerprint,
        "p_attempt": message.attempt,
        "p_message": message.message,
        "p_delay": message.delay,
        # Published means now, 0 seconds from now. A null duration makes it null.
        "p_published": 0.0 if message.published else None,
        "p_publish_within": message.publish_within,
    }


def holder_parameters(holder: Holder) -> dict[str, Any]:
    """Parameters of :func:`has_key` and of the fence: the token, or the worker."""
    fence: dict[str, Any] = {"p_token": holder.token} if isinstance(holder, Claim) else {"p_worker": holder.worker}
    return {**key_parameters(holder.key), **fence}


# -- rows --------------------------------------------------------------------------------------------------------------


class Lookup:
    """The row of a message, read together with the clock.

    Args:
        table: The table.
        made: Compiles statements.
    """

    def __init__(self, table: Table, made: Callable[[Select[Any]], Select[Any]] = lambda query: query) -> None:
        self._table = table
        self._all = made(select(table, Now().label("read_at")))
        self._select = self._all.where(has_key(table))

    def __call__(self, connection: Connection, key: MessageKey) -> Row | None:
        """Read the row; ``None`` if there is none."""
        read = connection.execute(self._select, key_parameters(key)).mappings().first()
        return None if read is None else row_of(read)

    def many(self, connection: Connection, keys: Iterable[MessageKey]) -> list[Row]:
        """Read the existing rows of some messages, in any order."""
        return [row_of(read) for read in connection.execute(self._all.where(key_in(self._table, keys))).mappings()]


def row_of(read: RowMapping) -> Row:
    """Return a row as a record. Columns that were not selected are ``None``."""
    key = MessageKey(read["message_id"], read["task_name"])
    of = (key.message_id, key.task_name)
    status, processed = statuses_of(read["status"], read["processed_status"], of=of)
    return Row(
        key=key,
        status=status,
        processed_status=processed,
        created_timestamp=read["created_timestamp"],
        processed_timestamp=read["processed_timestamp"],
        task_id=read["task_id"],
        queue=read["queue"],
        fingerprint=read["fingerprint"],
        attempt=read["attempt"],
        token=read["token"],
        worker=read["worker"],
        lease_expires_at=read["lease_expires_at"],
        available_at=read["available_at"],
        published_at=read["published_at"],
        expires_at=read["expires_at"],
        duplicates=read["duplicates"],
        message=read.get("message"),
        result=read.get("result"),
        error=read["error"],
        read_at=read["read_at"],
        takeovers=read["takeovers"],
        ran_task_id=read["ran_task_id"],
        steps=read.get("steps"),
    )
