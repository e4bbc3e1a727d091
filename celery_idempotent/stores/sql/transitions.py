"""The verbs of a run and its end: keep steps, checkpoint, complete, fail, retry, release, expire, abandon, cancel, forbid.

Each is a single ``UPDATE``, fenced by the holder. Only if that changed no row is the row read, to tell an ending that was already written
from one that came too late.
"""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table, Update, bindparam, func, null, update
from sqlalchemy.exc import DBAPIError

from celery_idempotent.core.records import Claim, Holder, MessageKey, NewMessage, NoResultReason, Row
from celery_idempotent.core.storable import in_ascii
from celery_idempotent.stores import took_effect
from celery_idempotent.stores.sql.clock import FromNow, Now, seconds
from celery_idempotent.stores.sql.columns import (
    DONE,
    FAILURE,
    PENDING,
    PROCESSING,
    SUCCESS,
    has_key,
    holder_parameters,
    key_parameters,
    parameter,
)
from celery_idempotent.stores.sql.connection import Attempt, Database
from celery_idempotent.stores.sql.dialects import Fault
from celery_idempotent.stores.sql.direct import directly
from celery_idempotent.stores.sql.verbs import Verbs, verb, wrote

__all__ = ["Transitions"]


class Transitions(Verbs):
    """The verbs that write how a run, or a message, ended."""

    def __init__(self, table: Table, database: Database) -> None:
        super().__init__(table, database)
        self._transitions = _Statements(table)

    @verb
    def checkpoint(self, on: Attempt, claim: Claim, *, result: bytes | None, lease: float | None = None) -> bool:
        parameters = {**holder_parameters(claim), "p_result": result, "p_lease": lease}
        return wrote(on, self._transitions.checkpoint, parameters)

    @verb
    def keep_steps(self, on: Attempt, claim: Claim, *, steps: bytes) -> bool:
        return wrote(on, self._transitions.keep_steps, {**holder_parameters(claim), "p_steps": steps})

    @verb
    def complete(
        self,
        on: Attempt,
        claim: Claim,
        *,
        result: bytes | None,
        note: NoResultReason | None = None,
        unique_for: float | None = None,
    ) -> bool:
        parameters = {
            **holder_parameters(claim),
            "p_result": result,
            "p_error": None if note is None else note.value,
            "p_unique_for": unique_for,
        }
        return wrote(on, self._transitions.complete, parameters) or self._shows(
            on, claim.key, lambda row: took_effect.complete(row, claim)
        )

    @verb
    def fail(self, on: Attempt, holder: Holder, *, error: str, unique_for: float | None = None) -> bool:
        parameters = {**holder_parameters(holder), "p_error": error, "p_unique_for": unique_for}
        return self._wrote_error(on, self._transitions.fail.by(holder), parameters) or (
            (on.is_retry or isinstance(holder, Claim))
            and self._shows(on, holder.key, lambda row: took_effect.fail(row, holder, error=error))
        )

    @verb
    def retry(self, on: Attempt, holder: Holder, message: NewMessage) -> bool:
        parameters = {
            **holder_parameters(holder),
            "p_attempt": message.attempt,
            "p_fingerprint": message.fingerprint,
            "p_queue": message.queue,
            "p_message": message.message,
            "p_delay": message.delay,
            "p_published": 0.0 if message.published else None,
        }
        return wrote(on, self._transitions.retry.by(holder), parameters) or (
            on.is_retry and self._shows(on, holder.key, lambda row: took_effect.retry(row, holder, message))
        )

    @verb
    def release(self, on: Attempt, holder: Holder) -> bool:
        return wrote(on, self._transitions.release.by(holder), holder_parameters(holder)) or (
            on.is_retry and self._shows(on, holder.key, lambda row: took_effect.release(row, holder))
        )

    @verb
    def expire(self, on: Attempt, holder: Holder) -> bool:
        return wrote(on, self._transitions.expire.by(holder), holder_parameters(holder))

    @verb
    def abandon(self, on: Attempt, row: Row, *, error: str, unique_for: float | None = None) -> bool:
        parameters = {
            **key_parameters(row.key),
            "p_token": row.token,
            "p_processed_status": None if row.processed_status is None else row.processed_status.value,
            "p_error": error,
            "p_unique_for": unique_for,
        }
        return self._wrote_error(on, self._transitions.abandon, parameters) or (
            on.is_retry and self._shows(on, row.key, lambda found: took_effect.abandon(found, row, error=error))
        )

    @verb
    def cancel(
        self, on: Attempt, key: MessageKey, *, task_id: str, error: str, unique_for: float | None = None
    ) -> bool:
        parameters = {**key_parameters(key), "p_task_id": task_id, "p_error": error, "p_unique_for": unique_for}
        return self._wrote_error(on, self._transitions.cancel, parameters) or (
            on.is_retry and self._shows(on, key, lambda row: took_effect.cancel(row, task_id=task_id, error=error))
        )

    @verb
    def forbid(self, on: Attempt, row: Row, *, error: str) -> bool:
        return wrote(on, self._transitions.forbid, {**key_parameters(row.key), "p_token": row.token, "p_error": error})

    def _wrote_error(self, on: Attempt, statement: Update, parameters: Mapping[str, Any]) -> bool:
        """Write an ending with its error. If the database lacks characters of the error, write it in ASCII: no ending is refused for that."""
        error = parameters["p_error"]
        try:
            return wrote(on, statement, parameters)
        except (DBAPIError, UnicodeEncodeError) as refusal:
            refused = isinstance(refusal, UnicodeEncodeError) or self._dialect.fault(refusal) is Fault.OTHER
            if on.in_transaction or error.isascii() or not refused:
                raise
        return wrote(on, statement, {**parameters, "p_error": in_ascii(error)})


@dataclass(frozen=True, slots=True)
class _Fenced:
    """A write after a claim, fenced by the claim's token or by its worker."""

    by_token: Update
    by_worker: Update

    def by(self, holder: Holder) -> Update:
        return self.by_token if isinstance(holder, Claim) else self.by_worker


class _Statements:
    """The statements of these verbs, for one table."""

    def __init__(self, table: Table) -> None:
        token = table.c.token == parameter(table, "token")
        worker = table.c.worker == parameter(table, "worker")
        processing = table.c.status == PROCESSING

        def fenced(**values: Any) -> _Fenced:
            written = update(table).where(has_key(table), processing).values(values)
            # A process that ends another's run knows that the worker died, but not whether the body had ended before.
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
        self.checkpoint = fenced(processed_status=SUCCESS, result=result, lease_expires_at=lease).by_token
        self.keep_steps = fenced(steps=parameter(table, "steps")).by_token
        self.complete = fenced(
            **ended,
            processed_status=SUCCESS,
            message=null(),
            steps=null(),
            result=func.coalesce(result, table.c.result),
        ).by_token
        failed = {**ended, "processed_status": FAILURE, "result": null()}
        self.fail = fenced(**failed)
        self.retry = fenced(
            **returned,
            **{name: parameter(table, name) for name in ("attempt", "fingerprint", "queue", "message")},
            available_at=FromNow(seconds("p_delay")),
            published_at=FromNow(seconds("p_published")),
        )
        # The broker has it again as of now: how long it has been waiting does not count the time it ran.
        self.release = fenced(**returned, published_at=Now())
        expired = update(table).where(has_key(table), processing).values(lease_expires_at=Now())
        self.expire = _Fenced(expired.where(token), expired.where(worker))
        self.abandon = (
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
        self.cancel = (
            update(table)
            .where(has_key(table), table.c.status == PENDING, table.c.task_id == parameter(table, "task_id"))
            .values(failed)
        )
        self.forbid = (
            update(table)
            .where(has_key(table), processing, token, table.c.processed_status.is_(None))
            .values(error=parameter(table, "error"))
        )
