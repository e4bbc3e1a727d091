"""The consumer's verbs that begin and keep a run: claim, take over, renew."""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Table, case, literal_column, null, or_, update

from celery_idempotent.core.records import Claim, Claimed, Holder, NewMessage, NotClaimed, Row, Status
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.stores import took_effect
from celery_idempotent.stores.batches import in_batches
from celery_idempotent.stores.sql.clock import FromNow, Now, seconds
from celery_idempotent.stores.sql.columns import (
    PENDING,
    PROCESSING,
    free_again,
    has_key,
    holder_parameters,
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

__all__ = ["Claims"]


class Claims(Verbs):
    """Grants claims and leases."""

    def __init__(self, table: Table, database: Database) -> None:
        super().__init__(table, database)
        self._claims = _Statements(table, database.dialect)

    @verb
    def claim(
        self,
        on: Attempt,
        message: NewMessage,
        *,
        worker: str,
        lease: float,
        grace: float,
        adopt: Callable[[], NewMessage] | None = None,
    ) -> Claimed | NotClaimed:
        # One update claims a recorded, pending message. Everything else is found out afterwards.
        key = message.key
        claim_parameters = {
            **key_parameters(key),
            "p_attempt": message.attempt,
            "p_fingerprint": message.fingerprint,
            "p_worker": worker,
            "p_ran_task_id": message.task_id,
            "p_lease": lease,
            "p_grace_ago": -grace,
        }
        whole: dict[str, Any] | None = None
        for _ in range(ROUNDS):
            token = self._dialect.token(on.connection.execute(self._claims.claim, claim_parameters))
            if token is not None:
                return Claimed(Claim(key, token))
            row = self._read(on.connection, key)
            if row is not None and not row.is_free_for(message.task_id, message.original_task_id):
                if on.is_retry and took_effect.claim(row, worker=worker):
                    return Claimed(Claim(key, row.token))
                if _claimable(row, message, grace):
                    continue  # became so since
                return NotClaimed(row)
            if whole is None:
                adopted = message if adopt is None else adopt()
                own = {name: claim_parameters[name] for name in ("p_worker", "p_ran_task_id", "p_lease")}
                whole = {**message_parameters(adopted), **key_parameters(key), **own}
            if row is None:
                if self._dialect.inserted(on.connection, self._claims.insert, whole):
                    return Claimed(Claim(key, 1))
            else:
                restart = on.connection.execute(self._claims.restart, {**whole, "p_token": row.token})
                token = self._dialect.token(restart)
                if token is not None:
                    return Claimed(Claim(key, token))
        raise StoreUnavailableError(f"message {key.message_id!r} could not be claimed: its row kept changing")

    @verb
    def take_over(
        self, on: Attempt, row: Row, *, task_id: str, worker: str, lease: float, attempt: int
    ) -> Claimed | None:
        parameters = {
            **key_parameters(row.key),
            "p_token": row.token,
            "p_processed_status": None if row.processed_status is None else row.processed_status.value,
            "p_worker": worker,
            "p_ran_task_id": task_id,
            "p_lease": lease,
            "p_attempt": attempt,
        }
        taken = wrote(on, self._claims.take_over, parameters) or (
            on.is_retry and self._shows(on, row.key, lambda found: took_effect.take_over(found, row, worker=worker))
        )
        return Claimed(Claim(row.key, row.token + 1)) if taken else None

    def renew(self, holders: Sequence[Holder], *, lease: float) -> list[Holder]:
        return [lost for some in in_batches(holders) for lost in self._renew_some(some, lease=lease)]

    @verb
    def _renew_some(self, on: Attempt, holders: Sequence[Holder], *, lease: float) -> list[Holder]:
        # In the order of the key, so that two calls over the same rows do not wait for each other crosswise.
        ordered = sorted(holders, key=lambda holder: (holder.key.message_id, holder.key.task_name))
        kept = {holder for holder in ordered if self._renewed(on, holder, lease)}
        return [holder for holder in holders if holder not in kept]

    def _renewed(self, on: Attempt, holder: Holder, lease: float) -> bool:
        renew = self._claims.renew_by_token if isinstance(holder, Claim) else self._claims.renew_by_worker
        if wrote(on, renew, {**holder_parameters(holder), "p_lease": lease}):
            return True
        row = self._read(on.connection, holder.key)  # whose lease may be longer
        return row is not None and row.status is Status.PROCESSING and took_effect.held_by(row, holder)


def _claimable(row: Row, message: NewMessage, grace: float) -> bool:
    """Return whether the row as it was read would have been claimed: the ``WHERE`` of the claim, in Python."""
    due = row.attempt <= message.attempt or (row.available_at is not None and row.available_in <= -grace)
    same = None in (row.fingerprint, message.fingerprint) or row.fingerprint == message.fingerprint
    return row.status is Status.PENDING and due and same


class _Statements:
    """The statements of these verbs, for one table."""

    def __init__(self, table: Table, dialect: Dialect) -> None:
        attempt, fingerprint = parameter(table, "attempt"), parameter(table, "fingerprint")
        taken: dict[str, Any] = {
            "status": PROCESSING,
            "worker": parameter(table, "worker"),
            "ran_task_id": parameter(table, "ran_task_id"),
            "lease_expires_at": FromNow(seconds("p_lease")),
        }
        greater_attempt = case((table.c.attempt < attempt, attempt), else_=table.c.attempt)
        next_token = dialect.next_token(table.c.token)
        claim = dialect.telling_token(
            update(table)
            .where(
                has_key(table),
                table.c.status == PENDING,
                or_(table.c.attempt <= attempt, table.c.available_at <= FromNow(seconds("p_grace_ago"))),
                or_(table.c.fingerprint.is_(None), fingerprint.is_(None), table.c.fingerprint == fingerprint),
            )
            .values(
                **taken,
                token=next_token,
                attempt=greater_attempt,
                processed_status=null(),
                error=null(),
                available_at=null(),
                takeovers=literal_column("0"),
            ),
            table,
        )
        self.claim = directly(claim)
        restarted = {**initial_values(table), **taken, "available_at": null()}
        self.insert = directly(dialect.insert(table, {**new_key(table), "token": literal_column("1"), **restarted}))
        self.restart = dialect.telling_token(
            update(table)
            # The row as it was read: since then it may have been started again and ended, and this delivery be a copy of that.
            .where(has_key(table), free_again(table), table.c.token == parameter(table, "token"))
            .values(**restarted, token=next_token),
            table,
        )
        self.take_over = (
            update(table)
            .where(
                has_key(table),
                table.c.status == PROCESSING,
                table.c.token == parameter(table, "token"),
                # A recovery point written since the row was read makes a rerun a replay.
                table.c.processed_status.is_not_distinct_from(parameter(table, "processed_status")),
                table.c.lease_expires_at <= Now(),
            )
            .values(
                **taken,
                token=table.c.token + literal_column("1"),
                attempt=greater_attempt,
                error=null(),
                takeovers=table.c.takeovers + literal_column("1"),
            )
        )
        renewed = FromNow(seconds("p_lease"))
        renew = (
            update(table)
            # Not one that is longer: an atomic body whose snapshot is fixed must not find its row written meanwhile.
            .where(has_key(table), table.c.status == PROCESSING, table.c.lease_expires_at <= renewed)
            .values(lease_expires_at=renewed)
        )
        self.renew_by_token = directly(renew.where(table.c.token == parameter(table, "token")))
        self.renew_by_worker = directly(renew.where(table.c.worker == parameter(table, "worker")))
