"""The verbs that end or hand on a run: checkpoint, complete, fail, retry, release, expire, abandon, cancel.

As in :mod:`~celery_idempotent.stores.sql.producer`, each takes the connection, and ``is_retry`` says that it is a repeat. Every
one is a single ``UPDATE`` fenced by the holder; only when that changed no row is the row read, to tell an ending that was
already written from one that came too late.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, Update, bindparam, func, null, update

from celery_idempotent.core.records import (
    Claim,
    Holder,
    MessageKey,
    NewMessage,
    NoResultReason,
    Owner,
    ProcessedStatus,
    Row,
    Status,
)
from celery_idempotent.stores.sql.clock import FromNow, Now, seconds
from celery_idempotent.stores.sql.columns import (
    DONE,
    FAILURE,
    PENDING,
    PROCESSING,
    SUCCESS,
    Lookup,
    has_key,
    held_by,
    holder_parameters,
    key_parameters,
    parameter,
)
from celery_idempotent.stores.sql.direct import directly
from celery_idempotent.stores.sql.table import storable

__all__ = ["Transitions"]


@dataclass(frozen=True, slots=True)
class _Fenced:
    """A write after a claim, fenced by the claim's token or by its worker."""

    by_token: Update
    by_worker: Update

    def by(self, holder: Holder) -> Update:
        return self.by_token if isinstance(holder, Claim) else self.by_worker


class Transitions:
    """Statements and verbs that end runs, for one table."""

    def __init__(self, table: Table) -> None:
        self._read = Lookup(table)
        token = table.c.token == parameter(table, "token")
        worker = table.c.worker == parameter(table, "worker")
        processing = table.c.status == PROCESSING

        def fenced(**values: Any) -> _Fenced:
            written = update(table).where(has_key(table), processing).values(values)
            # Whoever ends a run from outside knows that its process died, not that its body had ended before.
            by_worker = written.where(worker, table.c.processed_status.is_(None))
            return _Fenced(directly(written.where(token)), directly(by_worker))

        ended = {
            "status": DONE,
            "processed_timestamp": Now(),
            "lease_expires_at": null(),
            "expires_at": FromNow(seconds("p_unique_for")),
            "error": parameter(table, "error"),
        }
        # Back to pending. The worker stays: null would mean that the message was never claimed.
        returned = {"status": PENDING, "processed_status": null(), "lease_expires_at": null(), "result": null()}
        result = bindparam("p_result", type_=table.c.result.type)
        lease = func.coalesce(FromNow(seconds("p_lease")), table.c.lease_expires_at)
        self._checkpoint = fenced(processed_status=SUCCESS, result=result, lease_expires_at=lease).by_token
        self._complete = fenced(
            **ended, processed_status=SUCCESS, message=null(), result=func.coalesce(result, table.c.result)
        ).by_token
        failed = {**ended, "processed_status": FAILURE, "result": null()}
        self._fail = fenced(**failed)
        self._retry = fenced(
            **returned,
            **{name: parameter(table, name) for name in ("attempt", "fingerprint", "queue", "message")},
            available_at=FromNow(seconds("p_delay")),
            published_at=FromNow(seconds("p_published")),
        )
        # The broker has it again as of now: how long it has been waiting does not count the time it ran.
        self._release = fenced(**returned, published_at=Now())
        expired = update(table).where(has_key(table), processing).values(lease_expires_at=Now())
        self._expire = _Fenced(expired.where(token), expired.where(worker))
        self._abandon = (
            update(table)
            .where(
                has_key(table),
                processing,
                token,
                # A recovery point written since the row was read is not to be lost.
                table.c.processed_status.is_not_distinct_from(parameter(table, "processed_status")),
                table.c.lease_expires_at <= Now(),
            )
            .values(failed)
        )
        self._cancel = (
            update(table)
            .where(has_key(table), table.c.status == PENDING, table.c.task_id == parameter(table, "task_id"))
            .values(failed)
        )

        self._forbid = (
            update(table)
            .where(has_key(table), processing, token, table.c.processed_status.is_(None))
            .values(error=parameter(table, "error"))
        )

    def checkpoint(self, connection: Connection, claim: Claim, *, result: bytes | None, lease: float | None) -> bool:
        """Write the recovery point; written a second time it is the same."""
        return _wrote(connection, self._checkpoint, {**holder_parameters(claim), "p_result": result, "p_lease": lease})

    def complete(
        self,
        connection: Connection,
        claim: Claim,
        *,
        result: bytes | None,
        note: NoResultReason | None,
        unique_for: float | None,
    ) -> bool:
        """Done, success."""
        parameters = {
            **holder_parameters(claim),
            "p_result": result,
            "p_error": None if note is None else note.value,
            "p_unique_for": unique_for,
        }
        if _wrote(connection, self._complete, parameters):
            return True
        # Nobody else can have ended it so under this token.
        row = self._read(connection, claim.key)
        return row is not None and row.token == claim.token and _ended(row, ProcessedStatus.SUCCESS)

    def fail(
        self, connection: Connection, holder: Holder, *, error: str, unique_for: float | None, is_retry: bool
    ) -> bool:
        """Done, failure."""
        parameters = {**holder_parameters(holder), "p_error": error, "p_unique_for": unique_for}
        if _wrote(connection, self._fail.by(holder), parameters):
            return True
        if isinstance(holder, Owner) and not is_retry:
            return False
        # An owner that was found dead and abandoned ends so too, under the same token: the error tells them apart.
        row = self._read(connection, holder.key)
        return (
            row is not None
            and held_by(row, holder)
            and _ended(row, ProcessedStatus.FAILURE)
            and row.error == storable(error)
        )

    def retry(self, connection: Connection, holder: Holder, message: NewMessage, *, is_retry: bool) -> bool:
        """Back to pending, for the next attempt."""
        parameters = {
            **holder_parameters(holder),
            "p_attempt": message.attempt,
            "p_fingerprint": message.fingerprint,
            "p_queue": message.queue,
            "p_message": message.message,
            "p_delay": message.delay,
            "p_published": 0.0 if message.published else None,
        }
        if _wrote(connection, self._retry.by(holder), parameters):
            return True
        row = self._read(connection, holder.key) if is_retry else None
        return (
            row is not None and held_by(row, holder) and (row.status, row.attempt) == (Status.PENDING, message.attempt)
        )

    def release(self, connection: Connection, holder: Holder, *, is_retry: bool) -> bool:
        """Back to pending, for the same attempt."""
        if _wrote(connection, self._release.by(holder), holder_parameters(holder)):
            return True
        row = self._read(connection, holder.key) if is_retry else None
        return row is not None and held_by(row, holder) and row.status is Status.PENDING

    def expire(self, connection: Connection, holder: Holder) -> bool:
        """End the lease now."""
        return _wrote(connection, self._expire.by(holder), holder_parameters(holder))

    def abandon(
        self, connection: Connection, row: Row, *, error: str, unique_for: float | None, is_retry: bool
    ) -> bool:
        """Done, failure, on behalf of an owner whose lease ran out."""
        parameters = {
            **key_parameters(row.key),
            "p_token": row.token,
            "p_processed_status": None if row.processed_status is None else row.processed_status.value,
            "p_error": error,
            "p_unique_for": unique_for,
        }
        if _wrote(connection, self._abandon, parameters):
            return True
        found = self._read(connection, row.key) if is_retry else None
        return (
            found is not None
            and found.token == row.token
            and _ended(found, ProcessedStatus.FAILURE)
            and found.error == storable(error)
        )

    def cancel(
        self,
        connection: Connection,
        key: MessageKey,
        *,
        task_id: str,
        error: str,
        unique_for: float | None,
        is_retry: bool,
    ) -> bool:
        """Done, failure, without having run."""
        parameters = {**key_parameters(key), "p_task_id": task_id, "p_error": error, "p_unique_for": unique_for}
        if _wrote(connection, self._cancel, parameters):
            return True
        found = self._read(connection, key) if is_retry else None
        return (
            found is not None
            and found.task_id == task_id
            and _ended(found, ProcessedStatus.FAILURE)
            and found.error == storable(error)
        )

    def forbid(self, connection: Connection, row: Row, *, error: str) -> bool:
        """Not to run again."""
        return _wrote(connection, self._forbid, {**key_parameters(row.key), "p_token": row.token, "p_error": error})


def _wrote(connection: Connection, statement: Update, parameters: dict[str, Any]) -> bool:
    """Execute it. Returns whether its condition held."""
    return connection.execute(statement, parameters).rowcount > 0


def _ended(row: Row, how: ProcessedStatus) -> bool:
    return row.status is Status.DONE and row.processed_status is how
