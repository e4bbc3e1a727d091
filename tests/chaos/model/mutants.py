"""Stores and decisions with one fault each, which the model has to find: what it cannot find, it does not show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from celery_idempotent.core.decision import (
    Delivery,
    DeliveryAction,
    DeliveryDecision,
    DeliveryPolicy,
    decide_delivery,
)
from celery_idempotent.core.records import (
    Claim,
    Claimed,
    Duplicate,
    Holder,
    Inserted,
    MessageKey,
    NewMessage,
    NoResultReason,
    NotClaimed,
    Owner,
    ProcessedStatus,
    Row,
    RowFilter,
    Status,
)
from celery_idempotent.stores.sql import SQLStore

__all__ = ["DECISIONS", "RARE", "RARE_DECISIONS", "STORES"]

Decide = Callable[[Row | None, Delivery, DeliveryPolicy], DeliveryDecision]


class _Faulty(SQLStore):
    """What the faults are made with."""

    def _now(self, holder: Holder) -> Claim:
        """Return the current claim, whoever has it."""
        row = self.find(holder.key)
        return Claim(holder.key, -1 if row is None else row.token)

    def _set(self, key: MessageKey, **values: Any) -> None:
        table = self._table
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(table)
                .where(table.c.message_id == key.message_id, table.c.task_name == key.task_name)
                .values(**values)
            )


# -- fencing ------------------------------------------------------------------------------------------------------------


class CompletesWithAnyToken(_Faulty):
    def complete(
        self, claim: Claim, *, result: bytes | None, note: NoResultReason | None = None, unique_for: float | None = None
    ) -> bool:
        return super().complete(self._now(claim), result=result, note=note, unique_for=unique_for)


class FailsWithAnyToken(_Faulty):
    def fail(self, holder: Holder, *, error: str, unique_for: float | None = None) -> bool:
        return super().fail(self._now(holder), error=error, unique_for=unique_for)


class RetriesWithAnyToken(_Faulty):
    def retry(self, holder: Holder, message: NewMessage) -> bool:
        return super().retry(self._now(holder), message)


class RenewsByWorkerOnly(_Faulty):
    """A claim that was lost is not reported lost."""

    def renew(self, holders: Any, *, lease: float) -> list[Holder]:
        super().renew([self._now(holder) for holder in holders], lease=lease)
        return []


class SaysItWroteWhatItDidNot(_Faulty):
    def complete(
        self, claim: Claim, *, result: bytes | None, note: NoResultReason | None = None, unique_for: float | None = None
    ) -> bool:
        super().complete(claim, result=result, note=note, unique_for=unique_for)
        return True


# -- claiming -----------------------------------------------------------------------------------------------------------


class TakesOverFromTheLiving(_Faulty):
    """The lease that was read is trusted, and not asked for again."""

    def take_over(self, row: Row, *, task_id: str, worker: str, lease: float, attempt: int) -> Claimed | None:
        self.expire(Owner(row.key, row.worker or ""))
        return super().take_over(row, task_id=task_id, worker=worker, lease=lease, attempt=attempt)


class AbandonsTheLiving(_Faulty):
    def abandon(self, row: Row, *, error: str, unique_for: float | None = None) -> bool:
        self.expire(Owner(row.key, row.worker or ""))
        return super().abandon(row, error=error, unique_for=unique_for)


class TakesOverWithTheSameToken(_Faulty):
    def take_over(self, row: Row, *, task_id: str, worker: str, lease: float, attempt: int) -> Claimed | None:
        claimed = super().take_over(row, task_id=task_id, worker=worker, lease=lease, attempt=attempt)
        if claimed is None:
            return None
        self._set(row.key, token=row.token)
        return Claimed(Claim(row.key, row.token))


class DoesNotCountTakeovers(_Faulty):
    def take_over(self, row: Row, *, task_id: str, worker: str, lease: float, attempt: int) -> Claimed | None:
        claimed = super().take_over(row, task_id=task_id, worker=worker, lease=lease, attempt=attempt)
        if claimed is not None:
            self._set(row.key, takeovers=0)
        return claimed


class ForgetsTheRecoveryPointAtATakeover(_Faulty):
    def take_over(self, row: Row, *, task_id: str, worker: str, lease: float, attempt: int) -> Claimed | None:
        claimed = super().take_over(row, task_id=task_id, worker=worker, lease=lease, attempt=attempt)
        if claimed is not None:
            self._set(row.key, processed_status=None)
        return claimed


class ClaimsForOldCopies(_Faulty):
    """A copy from before a retry runs in the retry's place."""

    def claim(self, message: NewMessage, **options: Any) -> Claimed | NotClaimed:
        return super().claim(replace(message, attempt=99), **options)


class ClaimsWhatIsDone(_Faulty):
    def claim(self, message: NewMessage, **options: Any) -> Claimed | NotClaimed:
        answer = super().claim(message, **options)
        if isinstance(answer, NotClaimed) and answer.row.status is Status.DONE:
            self._set(message.key, status="pending")
            return super().claim(message, **options)
        return answer


class ClaimsForCopiesOfWhatEnded(_Faulty):
    """An id that is free for calls is free for copies of the message that ended, too."""

    def claim(self, message: NewMessage, **options: Any) -> Claimed | NotClaimed:
        answer = super().claim(message, **options)
        if isinstance(answer, NotClaimed) and answer.row.expired:
            return super().claim(replace(message, task_id=f"not {message.task_id}", original_task_id=None), **options)
        return answer


class StartsAnewWithoutItsToken(_Faulty):
    """An id that is free again begins at token 1, as an old run of it may have."""

    def claim(self, message: NewMessage, **options: Any) -> Claimed | NotClaimed:
        self._forget(message.key)
        return super().claim(message, **options)

    def record(self, message: NewMessage) -> Inserted | Duplicate:
        self._forget(message.key)
        return super().record(message)

    def _forget(self, key: MessageKey) -> None:
        row = self.find(key)
        if row is not None and row.expired:
            self._set(key, token=0)


# -- ending -------------------------------------------------------------------------------------------------------------


class ForgetsTheRecoveryPoint(_Faulty):
    def checkpoint(self, claim: Claim, *, result: bytes | None, lease: float | None = None) -> bool:
        return bool(super().renew([claim], lease=60.0) == [])


class ReleasesByEndingTheLease(_Faulty):
    def release(self, holder: Holder) -> bool:
        return self.expire(holder)


class ForgetsWhatIsForbidden(_Faulty):
    def forbid(self, row: Row, *, error: str) -> bool:
        return super().forbid(row, error=error) and super().forbid(row, error="")


class RetriesTheSameAttempt(_Faulty):
    """Retries are forgotten, so that the copy from before it may run as well as the retry: twice, one after the other."""

    def retry(self, holder: Holder, message: NewMessage) -> bool:
        held = super().retry(holder, message)
        row = self.find(holder.key)
        if held and row is not None:
            self._set(holder.key, status="done", processed_status="success")
        return held


# -- producing ----------------------------------------------------------------------------------------------------------


class RecordsOverAnything(_Faulty):
    def record(self, message: NewMessage) -> Inserted | Duplicate:
        answer = super().record(message)
        if isinstance(answer, Duplicate) and answer.row.status is Status.DONE:
            self._set(message.key, expires_at=answer.row.read_at - timedelta(days=1))
            return super().record(message)
        return answer


class WithdrawsWhatWasClaimed(_Faulty):
    def withdraw(self, key: MessageKey, *, task_id: str) -> bool:
        self._set(key, status="pending", worker=None, task_id=task_id)
        return super().withdraw(key, task_id=task_id)


class ResubmitsAnything(_Faulty):
    def record(self, message: NewMessage) -> Inserted | Duplicate:
        answer = super().record(message)
        if isinstance(answer, Duplicate) and answer.row.status is Status.DONE:
            self._set(message.key, status="pending", processed_status=None, worker=None)
        return answer


# -- recovering ---------------------------------------------------------------------------------------------------------


class LeavesRecoveryPointsBehind(_Faulty):
    def lapsed(self, **options: Any) -> list[Row]:
        rows = super().lapsed(**options)
        return [row for row in rows if row.processed_status is not ProcessedStatus.SUCCESS]


class LeavesTheLapsedBehind(_Faulty):
    def lapsed(self, **options: Any) -> list[Row]:
        return []


class PublishesOnceAfterAllOwners(_Faulty):
    """A message whose owner died is published again once, and never again."""

    def lapsed(self, **options: Any) -> list[Row]:
        rows = super().lapsed(**options)
        return [row for row in rows if row.takeovers == 0]


class LeavesWhatWaitsBehind(_Faulty):
    def waiting(self, **options: Any) -> list[Row]:
        return [row for row in super().waiting(**options) if row.attempt == 0]


class PurgesByAgeAlone(_Faulty):
    def purge(self, *, older_than: float, limit: int, **_: Any) -> int:
        table = self._table
        with self.engine.begin() as connection:
            return connection.execute(sa.delete(table).where(table.c.status == "processing")).rowcount


class TouchesOtherRows(_Faulty):
    def complete(
        self, claim: Claim, *, result: bytes | None, note: NoResultReason | None = None, unique_for: float | None = None
    ) -> bool:
        held = super().complete(claim, result=result, note=note, unique_for=unique_for)
        for row in self.rows(RowFilter(message_id=claim.key.message_id)):
            super().complete(Claim(row.key, claim.token), result=None)
        return held


STORES: list[type[SQLStore]] = [
    SaysItWroteWhatItDidNot,
    TakesOverWithTheSameToken,
    DoesNotCountTakeovers,
    ClaimsForOldCopies,
    ClaimsForCopiesOfWhatEnded,
    ClaimsWhatIsDone,
    ForgetsTheRecoveryPoint,
    ForgetsTheRecoveryPointAtATakeover,
    RecordsOverAnything,
    ResubmitsAnything,
    LeavesTheLapsedBehind,
    PurgesByAgeAlone,
]

#: Those that take hundreds of examples to meet; they are looked for when these are asked for.
RARE: list[type[SQLStore]] = [
    CompletesWithAnyToken,
    FailsWithAnyToken,
    StartsAnewWithoutItsToken,
    ReleasesByEndingTheLease,
    PublishesOnceAfterAllOwners,
    RetriesWithAnyToken,
    RenewsByWorkerOnly,
    TakesOverFromTheLiving,
    AbandonsTheLiving,
    RetriesTheSameAttempt,
    ForgetsWhatIsForbidden,
    WithdrawsWhatWasClaimed,
    LeavesRecoveryPointsBehind,
    LeavesWhatWaitsBehind,
    TouchesOtherRows,
]


# -- decisions ----------------------------------------------------------------------------------------------------------


def _instead(of: DeliveryAction, action: DeliveryAction) -> Decide:
    def decide(row: Row | None, delivery: Delivery, policy: DeliveryPolicy) -> DeliveryDecision:
        decision = decide_delivery(row, delivery, policy)
        return DeliveryDecision(action) if decision.action is of else decision

    return decide


def _lets_owners_die_for_ever(row: Row | None, delivery: Delivery, policy: DeliveryPolicy) -> DeliveryDecision:
    return decide_delivery(row, delivery, replace(policy, max_takeovers=1000))


def _runs_old_copies(row: Row | None, delivery: Delivery, policy: DeliveryPolicy) -> DeliveryDecision:
    return decide_delivery(row, delivery, replace(policy, grace=-1000.0))


def _runs_what_is_forbidden(row: Row | None, delivery: Delivery, policy: DeliveryPolicy) -> DeliveryDecision:
    forbidden = row is not None and row.forbidden
    return decide_delivery(replace(row, error=None) if row is not None and forbidden else row, delivery, policy)


def _holds_what_is_done(row: Row | None, delivery: Delivery, policy: DeliveryPolicy) -> DeliveryDecision:
    decision = decide_delivery(row, delivery, policy)
    done = row is not None and row.status is Status.DONE
    return DeliveryDecision(DeliveryAction.HOLD, 60.0) if done and decision.action is DeliveryAction.SKIP else decision


DECISIONS: dict[str, Decide] = {
    "a recovery point runs again": _instead(DeliveryAction.TAKE_OVER_AND_REPLAY, DeliveryAction.TAKE_OVER),
    "a lapsed message is skipped": _instead(DeliveryAction.TAKE_OVER, DeliveryAction.SKIP),
    "a lapsed message is held": _instead(DeliveryAction.TAKE_OVER, DeliveryAction.HOLD),
    "a lapsed message is abandoned": _instead(DeliveryAction.TAKE_OVER, DeliveryAction.ABANDON),
    "a lapsed recovery point is abandoned": _instead(DeliveryAction.TAKE_OVER_AND_REPLAY, DeliveryAction.ABANDON),
    "a finished message is held for ever": _holds_what_is_done,
}

#: As :data:`RARE`.
RARE_DECISIONS: dict[str, Decide] = {
    "a live owner is taken over from": _instead(DeliveryAction.HOLD, DeliveryAction.TAKE_OVER),
    "an old copy runs in its retry's place": _runs_old_copies,
    "what was revoked while it ran runs again": _runs_what_is_forbidden,
    "owners die for ever": _lets_owners_die_for_ever,
}
