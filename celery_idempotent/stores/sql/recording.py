"""The producer's verbs: record one or many, withdraw, resubmit, republish, count a duplicate."""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Table, bindparam, delete, literal_column, null, or_, update

from celery_idempotent.core.records import Duplicate, Inserted, MessageKey, NewMessage, Row, Status
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.stores import took_effect
from celery_idempotent.stores.batches import in_batches
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
from celery_idempotent.stores.sql.connection import Attempt, Database
from celery_idempotent.stores.sql.dialects import Dialect
from celery_idempotent.stores.sql.direct import directly
from celery_idempotent.stores.sql.verbs import ROUNDS, Verbs, verb, wrote

__all__ = ["Recording"]

#: Seconds between the recording times of two rows of one insert, so that they keep their order; less than a row takes.
_APART = 1e-6


class Recording(Verbs):
    """The verbs that record calls, and take them back."""

    def __init__(self, table: Table, database: Database) -> None:
        super().__init__(table, database)
        self._recording = _Statements(table, database.dialect)

    @verb
    def record(self, on: Attempt, message: NewMessage) -> Inserted | Duplicate:
        return self._record(on, message)

    def _record(self, on: Attempt, message: NewMessage) -> Inserted | Duplicate:
        parameters = message_parameters(message)
        insert = self._recording.insert_unlocked if on.in_transaction else self._recording.insert
        for _ in range(ROUNDS):
            if self._dialect.inserted(on.connection, insert, parameters):
                return Inserted()
            row = self._lookup(on)(on.connection, message.key)
            if row is None:
                continue  # withdrawn or purged since
            if row.status is Status.DONE and row.expired:
                # The insert could not replace it; or it has expired since, and the next round replaces it.
                if wrote(on, self._recording.restart, parameters):
                    return Inserted()
                continue
            return Inserted() if on.is_retry and took_effect.record(row, message) else Duplicate(row)
        raise StoreUnavailableError(f"message {message.key.message_id!r} could not be recorded: its row kept changing")

    def record_all(self, messages: Sequence[NewMessage]) -> list[Inserted | Duplicate]:
        return [answer for some in in_batches(messages) for answer in self._record_some(some)]

    @verb
    def _record_some(self, on: Attempt, messages: Sequence[NewMessage]) -> list[Inserted | Duplicate]:
        """Insert the new ones in one statement, and read the others."""
        parameters = [
            {**message_parameters(message), "p_place": place * _APART} for place, message in enumerate(messages)
        ]
        # A retry cannot tell what its first attempt has inserted from what was there.
        insert_all = self._recording.insert_all
        keys = None if on.is_retry else self._dialect.inserted_keys(on.connection, insert_all, parameters)
        if keys is None:
            return [self._record(on, message) for message in messages]
        new = {MessageKey(*key) for key in keys}
        recorded: list[bool] = []
        for message in messages:
            recorded.append(message.key in new)
            new.discard(message.key)  # a later message with the same key finds this one
        others = [message.key for message, is_new in zip(messages, recorded, strict=True) if not is_new]
        rows = {row.key: row for row in self._lookup(on).many(on.connection, others)} if others else {}
        return [
            Inserted() if is_new else self._found_or_record(on, message, rows.get(message.key))
            for message, is_new in zip(messages, recorded, strict=True)
        ]

    def _found_or_record(self, on: Attempt, message: NewMessage, row: Row | None) -> Inserted | Duplicate:
        return self._record(on, message) if row is None or row.expired else Duplicate(row)

    def _lookup(self, on: Attempt) -> Lookup:
        """Return what reads a row; in a caller's transaction it does not lock the row until that ends."""
        return self._recording.read_in_transaction if on.in_transaction else self._read

    @verb
    def withdraw(self, on: Attempt, key: MessageKey, *, task_id: str) -> bool:
        parameters = {**key_parameters(key), "p_task_id": task_id}
        # A row that was started again keeps its token, which an old run may still hold. So it becomes free instead of being deleted.
        if wrote(on, self._recording.withdraw_new, parameters) or wrote(
            on, self._recording.withdraw_restarted, parameters
        ):
            return True
        return on.is_retry and took_effect.withdraw(self._read(on.connection, key), task_id=task_id)

    @verb
    def resubmit(self, on: Attempt, row: Row, message: NewMessage) -> bool:
        parameters = {
            **message_parameters(message),
            **key_parameters(row.key),
            "p_token": row.token,
            "p_task_id_read": row.task_id,
        }
        return wrote(on, self._recording.resubmit, parameters) or (
            on.is_retry and self._shows(on, row.key, lambda found: took_effect.resubmit(found, row, message))
        )

    @verb
    def republish(self, on: Attempt, row: Row) -> bool:
        parameters = {
            **key_parameters(row.key),
            "p_status": row.status.value,
            "p_token": row.token,
            "p_published_at": row.published_at,
        }
        return wrote(on, self._recording.republish, parameters) or (
            on.is_retry and self._shows(on, row.key, lambda found: took_effect.republish(found, row))
        )

    @verb
    def count_duplicate(self, on: Attempt, key: MessageKey) -> None:
        # Counted twice if the connection breaks after the database has counted.
        on.connection.execute(self._recording.count_duplicate, key_parameters(key))


class _Statements:
    """The statements of these verbs, for one table."""

    def __init__(self, table: Table, dialect: Dialect) -> None:
        self.read_in_transaction = Lookup(table, dialect.as_of_now)
        restarted = initial_values(table)
        new = {**new_key(table), "token": literal_column("0"), **restarted}
        self.insert = directly(dialect.insert(table, new, replaced=list(restarted), free=free_again(table)))
        self.insert_unlocked = dialect.insert(table, new)
        # In the order of the list, although all are recorded at one moment.
        self.insert_all = dialect.insert_all(table, {**new, "created_timestamp": FromNow(seconds("p_place"))})
        self.restart = update(table).where(has_key(table), free_again(table)).values(restarted)
        unclaimed = (
            table.c.status == PENDING,
            table.c.worker.is_(None),
            table.c.task_id == parameter(table, "task_id"),
        )
        self.withdraw_new = delete(table).where(has_key(table), *unclaimed, table.c.token == literal_column("0"))
        self.withdraw_restarted = (
            update(table)
            .where(has_key(table), *unclaimed)
            .values(
                status=DONE,
                processed_status=FAILURE,
                processed_timestamp=Now(),
                expires_at=Now(),
                error=literal_column("'withdrawn: the message could not be published'"),
                message=null(),
                steps=null(),
            )
        )
        self.resubmit = (
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
        self.republish = (
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
        self.count_duplicate = (
            update(table).where(has_key(table)).values(duplicates=table.c.duplicates + literal_column("1"))
        )
