"""The producer's verbs: record one or many, withdraw, resubmit, republish, count a duplicate.

Each takes the connection to work on. ``is_retry`` says that it is a repeat: an earlier attempt of the same call broke off with
its connection, and may have taken effect. A repeat that finds what that attempt would have written answers as if it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sqlalchemy import Connection, Table, bindparam, delete, literal_column, null, or_, update

from celery_idempotent.core.records import Duplicate, Inserted, MessageKey, NewMessage, Row, Status
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.stores.sql.clock import FromNow, JustAfter, Now, seconds
from celery_idempotent.stores.sql.columns import (
    DONE,
    FAILURE,
    PENDING,
    Lookup,
    free_again,
    has_key,
    initial_values,
    key_parameters,
    message_parameters,
    new_key,
    parameter,
)
from celery_idempotent.stores.sql.dialects import Dialect
from celery_idempotent.stores.sql.direct import directly

__all__ = ["ROUNDS", "Producer"]

#: How often a verb of several statements starts over because the row changed between two of them. Each time somebody
#: else got on, so that this many in a row mean that something is wrong.
ROUNDS = 20

#: Seconds between the moments at which rows of one insert are said to be recorded, so that they keep their order. Less than a row takes.
_APART = 1e-6


class Producer:
    """Statements and verbs of the producer's side, for one table."""

    def __init__(self, table: Table, dialect: Dialect) -> None:
        self._dialect = dialect
        self._read = Lookup(table)
        self._read_in_transaction = Lookup(table, dialect.as_of_now)
        restarted = initial_values(table)
        new = {**new_key(table), "token": literal_column("0"), **restarted}
        self._insert = directly(dialect.insert(table, new, replaced=list(restarted), free=free_again(table)))
        self._insert_unlocked = dialect.insert(table, new)
        # In the order of the list, although all at one moment.
        self._insert_all = dialect.insert_all(table, {**new, "created_timestamp": FromNow(seconds("p_place"))})
        self._restart = update(table).where(has_key(table), free_again(table)).values(restarted)
        unclaimed = (
            table.c.status == PENDING,
            table.c.worker.is_(None),
            table.c.task_id == parameter(table, "task_id"),
        )
        self._withdraw_new = delete(table).where(has_key(table), *unclaimed, table.c.token == literal_column("0"))
        self._withdraw_restarted = (
            update(table)
            .where(has_key(table), *unclaimed)
            .values(
                status=DONE,
                processed_status=FAILURE,
                processed_timestamp=Now(),
                expires_at=Now(),
                error=literal_column("'withdrawn: the message could not be published'"),
                message=null(),
            )
        )
        self._resubmit = (
            update(table)
            .where(
                has_key(table),
                table.c.status == DONE,
                table.c.processed_status == FAILURE,
                table.c.token == parameter(table, "token"),
                table.c.task_id == bindparam("p_task_id_read", type_=table.c.task_id.type),
            )
            .values(
                status=PENDING,
                processed_status=null(),
                processed_timestamp=null(),
                **{name: parameter(table, name) for name in ("task_id", "queue", "fingerprint", "attempt", "message")},
                worker=null(),
                lease_expires_at=FromNow(seconds("p_publish_within")),
                available_at=FromNow(seconds("p_delay")),
                published_at=FromNow(seconds("p_published")),
                expires_at=null(),
                result=null(),
                error=null(),
            )
        )
        self._republish = (
            update(table)
            .where(
                has_key(table),
                table.c.status == parameter(table, "status"),
                or_(table.c.lease_expires_at.is_(None), table.c.lease_expires_at <= Now()),
                table.c.token == parameter(table, "token"),
                table.c.published_at.is_not_distinct_from(parameter(table, "published_at")),
            )
            .values(published_at=JustAfter(table.c.published_at))
        )
        self._count_duplicate = (
            update(table).where(has_key(table)).values(duplicates=table.c.duplicates + literal_column("1"))
        )

    def record(
        self, connection: Connection, message: NewMessage, *, is_retry: bool, in_transaction: bool = False
    ) -> Inserted | Duplicate:
        """Insert, or replace a row whose id is free again, or report the row.

        In a transaction of somebody's a row that is there is looked at, and not locked until that ends.
        """
        parameters = message_parameters(message)
        insert = self._insert_unlocked if in_transaction else self._insert
        read = self._read_in_transaction if in_transaction else self._read
        for _ in range(ROUNDS):
            if self._dialect.inserted(connection, insert, parameters):
                return Inserted()
            row = read(connection, message.key)
            if row is None:
                continue  # withdrawn or purged since
            if row.status is Status.DONE and row.expired:
                # Where the insert could not replace it; or it expired since, and the next round replaces it.
                if connection.execute(self._restart, parameters).rowcount:
                    return Inserted()
                continue
            if is_retry and row.status is Status.PENDING and row.worker is None and row.task_id == message.task_id:
                return Inserted()
            return Duplicate(row)
        raise StoreUnavailableError(f"message {message.key.message_id!r} could not be recorded: its row kept changing")

    def record_all(
        self, connection: Connection, messages: Sequence[NewMessage], *, is_retry: bool, in_transaction: bool = False
    ) -> list[Inserted | Duplicate]:
        """Insert those that are new in one statement, and look at the others."""
        parameters = [
            {**message_parameters(message), "p_place": place * _APART} for place, message in enumerate(messages)
        ]
        # A repeat cannot tell what the attempt before it has inserted from what was there.
        keys = None if is_retry else self._dialect.inserted_keys(connection, self._insert_all, parameters)
        if keys is None:
            record = partial(self.record, connection, is_retry=is_retry, in_transaction=in_transaction)
            return [record(message) for message in messages]
        new = {MessageKey(*key) for key in keys}
        recorded: list[bool] = []
        for message in messages:
            recorded.append(message.key in new)
            new.discard(message.key)  # whoever has the same key further behind finds it
        others = [message.key for message, is_new in zip(messages, recorded, strict=True) if not is_new]
        read = self._read_in_transaction if in_transaction else self._read
        rows = {row.key: row for row in read.many(connection, others)} if others else {}
        return [
            Inserted() if is_new else self._found_or_record(connection, message, rows.get(message.key), in_transaction)
            for message, is_new in zip(messages, recorded, strict=True)
        ]

    def _found_or_record(
        self, connection: Connection, message: NewMessage, row: Row | None, in_transaction: bool
    ) -> Inserted | Duplicate:
        if row is None or row.expired:
            return self.record(connection, message, is_retry=False, in_transaction=in_transaction)
        return Duplicate(row)

    def withdraw(self, connection: Connection, key: MessageKey, *, task_id: str, is_retry: bool) -> bool:
        """Delete a pending row that was never claimed; free its id if the row had an earlier life."""
        parameters = {**key_parameters(key), "p_task_id": task_id}
        if connection.execute(self._withdraw_new, parameters).rowcount:
            return True
        # A row that started anew has a token that must outlive it: an old run may still hold it. So it becomes free again
        # rather than absent.
        if connection.execute(self._withdraw_restarted, parameters).rowcount:
            return True
        if not is_retry:
            return False
        row = self._read(connection, key)
        return row is None or (row.status is Status.DONE and row.expired and row.task_id == task_id)

    def resubmit(self, connection: Connection, row: Row, message: NewMessage, *, is_retry: bool) -> bool:
        """Failed to pending, by compare and set."""
        parameters = {
            **message_parameters(message),
            **key_parameters(row.key),
            "p_token": row.token,
            "p_task_id_read": row.task_id,
        }
        if connection.execute(self._resubmit, parameters).rowcount:
            return True
        if not is_retry:
            return False
        found = self._read(connection, row.key)
        return (
            found is not None
            and (found.status, found.token, found.task_id) == (Status.PENDING, row.token, message.task_id)
            and found.worker is None
        )

    def republish(self, connection: Connection, row: Row, *, is_retry: bool) -> bool:
        """Write a new ``published_at``, by compare and set."""
        parameters = {
            **key_parameters(row.key),
            "p_status": row.status.value,
            "p_token": row.token,
            "p_published_at": row.published_at,
        }
        if connection.execute(self._republish, parameters).rowcount:
            return True
        if not is_retry:
            return False
        # Whether this call or another wrote it cannot be told; a message published twice is absorbed by its claim, one
        # that nobody publishes is lost.
        found = self._read(connection, row.key)
        return found is not None and (found.status, found.token) == (row.status, row.token)

    def count_duplicate(self, connection: Connection, key: MessageKey) -> None:
        """One more. Counted twice if a connection breaks off between the writing and the answer."""
        connection.execute(self._count_duplicate, key_parameters(key))
