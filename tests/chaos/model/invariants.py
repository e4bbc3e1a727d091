"""Invariants: what a verb of the store may do to a row. The state machine once more, without SQL.

Each invariant is checked on the row before and after a verb, its arguments and its answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from celery_idempotent.core.decision import MAX_TAKEOVERS
from celery_idempotent.core.records import (
    Claim,
    Claimed,
    Holder,
    Inserted,
    MessageKey,
    NewMessage,
    ProcessedStatus,
    Row,
    Status,
)

__all__ = ["BrokenInvariantError", "VerbCall", "check_invariants", "same", "starts_anew"]

_SUCCESS, _FAILURE = ProcessedStatus.SUCCESS, ProcessedStatus.FAILURE

#: The row after a verb that its holder fences. The lease is no part of it.
_LEAVES = {
    "checkpoint": (Status.PROCESSING, _SUCCESS),
    "complete": (Status.DONE, _SUCCESS),
    "fail": (Status.DONE, _FAILURE),
    "retry": (Status.PENDING, None),
    "release": (Status.PENDING, None),
}
_FENCED = {*_LEAVES, "keep_steps", "expire", "renew"}


class BrokenInvariantError(AssertionError):
    """A verb did to a row what no verb may, or not what it answered."""


@dataclass(frozen=True)
class VerbCall:
    """A verb that was asked: its name, what it was given by parameter, and its answer."""

    verb: str
    given: Mapping[str, Any]
    answer: Any

    @property
    def holders(self) -> list[Holder]:
        """Who writes, for a fenced verb."""
        named = self.given.get("claim") or self.given.get("holder")
        return list(self.given.get("holders") or ([] if named is None else [named]))

    @property
    def keys(self) -> list[MessageKey]:
        """The rows it is about."""
        about = (self.given.get(name) for name in ("key", "row", "message"))
        many = [*(self.given.get("keys") or ()), *(message.key for message in self.given.get("messages") or ())]
        return [getattr(one, "key", one) for one in about if one is not None] + many + [one.key for one in self.holders]

    def __str__(self) -> str:
        return f"{self.verb}({', '.join(f'{name}={value}' for name, value in self.given.items() if name != 'self')})"


def check_invariants(act: VerbCall, key: MessageKey, before: Row | None, after: Row | None) -> None:
    """Hold one row's change to the laws.

    Raises:
        BrokenLawError: One is broken; it is named.
    """

    def law(name: str, holds: bool) -> None:
        if not holds:
            raise BrokenInvariantError(
                f"{name}\n  by {act}\n  answered {act.answer}\n  before {before}\n  after {after}"
            )

    if not same(before, after):
        law("a verb writes to the rows it is about, and to no other", key in act.keys or act.verb == "purge")
        if before is None:
            _appears(act, after, law)
        elif after is None:
            _vanishes(act, before, law)
        else:
            _changes(act, before, after, law)
    if before is not None and act.verb in _FENCED:
        _is_fenced(act, before, after, law)
    if act.verb in ("claim", "take_over") and isinstance(act.answer, Claimed) and key in act.keys:
        claim = act.answer.claim
        law("a claim stands in its row", after is not None and (after.key, after.token) == (claim.key, claim.token))
    if act.verb == "forbid" and act.answer and key in act.keys:
        law("what is forbidden is noted", after is not None and after.forbidden and after.error == act.given["error"])
    if act.verb == "record" and key in act.keys:
        law("what is recorded is there", after is not None)
        law(
            "a message is recorded over nothing but an id that is free",
            isinstance(act.answer, Inserted) == (before is None or _free(before, after)),
        )


def same(before: Row | None, after: Row | None) -> bool:
    """Return whether a row has not changed."""
    return (before and replace(before, read_at=after.read_at if after else before.read_at)) == after


def starts_anew(before: Row | None, after: Row | None) -> bool:
    """Return whether the message of a row is another one now, whose body may run however the last one ended."""
    if before is None or after is None:
        return True
    return before.status is Status.DONE and after.status is not Status.DONE


def _free(before: Row, after: Row | None) -> bool:
    now = (after or before).read_at
    return before.status is Status.DONE and before.expires_at is not None and before.expires_at <= now


def _lapsed(before: Row, after: Row) -> bool:
    return before.lease_expires_at is not None and before.lease_expires_at <= after.read_at


def _appears(act: VerbCall, after: Row | None, law: Any) -> None:
    assert after is not None
    law("a row is inserted by a record or a claim", act.verb in ("record", "record_all", "claim"))
    stands = (Status.PROCESSING, 1) if act.verb == "claim" else (Status.PENDING, 0)
    law("a new row is pending and unclaimed, or claimed once", (after.status, after.token) == stands)


def _vanishes(act: VerbCall, before: Row, law: Any) -> None:
    if act.verb == "purge":
        law("nothing but what is done is purged", before.status is Status.DONE)
    else:
        law("a row is deleted by a withdrawal or a purge", act.verb == "withdraw")
        unclaimed = before.status is Status.PENDING and before.worker is None and before.token == 0
        law("nothing that was ever claimed is withdrawn", unclaimed)
        law("a message is withdrawn by who recorded it", before.task_id == act.given["task_id"])


def _changes(act: VerbCall, before: Row, after: Row, law: Any) -> None:
    law("a token never falls", after.token >= before.token)
    if after.token > before.token:
        law("a token rises with a claim only", act.verb in ("claim", "take_over"))
        law("a token rises by one", after.token == before.token + 1)
        law("who is given a token is told so", isinstance(act.answer, Claimed) and after.status is Status.PROCESSING)
    else:
        law("what is claimed has a new token", act.verb not in ("claim", "take_over"))
    if act.verb == "count_duplicate":
        law("a duplicate is one more", same(replace(before, duplicates=before.duplicates + 1), after))
        return
    match before.status:
        case Status.PENDING:
            _leaves_pending(act, before, after, law)
        case Status.PROCESSING:
            _leaves_processing(act, before, after, law)
        case Status.DONE:
            _leaves_done(act, before, after, law)


def _leaves_pending(act: VerbCall, before: Row, after: Row, law: Any) -> None:
    verbs = ("claim", "cancel", "republish", "not_published", "withdraw", "relay", "relayed")
    law("a pending message is claimed, cancelled, withdrawn or published", act.verb in verbs)
    if act.verb == "claim":
        message: NewMessage = act.given["message"]
        grace = timedelta(seconds=act.given["grace"])
        waited = before.available_at is not None and before.available_at + grace <= after.read_at
        law("an old copy does not run in its retry's place", message.attempt >= before.attempt or waited)
        law("the greater attempt stays", after.attempt == max(before.attempt, message.attempt))
        law("takeovers are counted by attempt", after.takeovers == 0)
    elif act.verb == "relay":
        law("what was published is not relayed", before.published_at is None and after.published_at is None)
        law("one relay at a time has a message", before.lease_expires_at is None or _lapsed(before, after))
        law("who may publish is told so", act.answer is True and after.lease_expires_at is not None)
    elif act.verb == "relayed":
        law("what was published stays so", before.published_at is None)
        law("what was relayed is noted", (after.published_at is not None) is act.given["published"])
        law("nobody has the right to publish it any more", after.lease_expires_at is None)
    elif act.verb == "withdraw":
        law("nothing that runs is withdrawn", before.worker is None and before.task_id == act.given["task_id"])
        law("a withdrawn id is free", _free(after, None))


def _leaves_processing(act: VerbCall, before: Row, after: Row, law: Any) -> None:
    point = before.processed_status is _SUCCESS
    if act.verb == "take_over":
        law("a live owner is not taken over from", _lapsed(before, after))
        law("what is forbidden does not run again", not before.forbidden)
        law("one attempt loses a bounded number of owners", after.takeovers <= MAX_TAKEOVERS)
        law("takeovers are counted", after.takeovers == before.takeovers + 1)
        law("a recovery point outlives its owner", after.processed_status is before.processed_status)
    elif act.verb == "abandon":
        law("a live owner's message is not abandoned", _lapsed(before, after))
        law("an abandoned message has failed", (after.status, after.processed_status) == (Status.DONE, _FAILURE))
    elif act.verb == "forbid":
        law("a recovery point is not forbidden", not point)
        law("who forbids is told so", act.answer is True)
        law("a note changes nothing else", same(replace(before, error=act.given["error"]), after))
    elif act.verb == "keep_steps":
        law("steps change nothing else", same(replace(before, steps=act.given["steps"]), after))
    elif act.verb in ("republish", "not_published"):
        law("a publication changes nothing else", same(replace(before, published_at=after.published_at), after))
    else:
        law("who writes after a claim is fenced", act.verb in _FENCED)
    if point and after.status is not Status.DONE:
        law("a recovery point is not undone", after.processed_status is _SUCCESS)


def _leaves_done(act: VerbCall, before: Row, after: Row, law: Any) -> None:
    if act.verb == "resubmit":
        law("what has failed may be sent again", before.processed_status is _FAILURE)
        law("what is sent again waits", after.status is Status.PENDING)
    else:
        verbs = ("record", "record_all", "claim")
        law("done stays done until its id is free", act.verb in verbs and _free(before, after))
        if act.verb == "claim":
            message: NewMessage = act.given["message"]
            sent = {message.task_id, message.original_task_id or message.task_id}
            law("a copy of what ended never runs", not sent & {before.task_id, before.ran_task_id})


def _is_fenced(act: VerbCall, before: Row, after: Row | None, law: Any) -> None:
    for holder in act.holders:
        if holder.key != before.key:
            continue
        fence = before.token == holder.token if isinstance(holder, Claim) else before.worker == holder.worker
        held = before.status is Status.PROCESSING and fence
        law("who does not hold a message writes nothing", held or same(before, after))
        told = holder not in act.answer if act.verb == "renew" else bool(act.answer)
        law("who holds a message writes", told or not held)
        if told and act.verb in _LEAVES:
            assert after is not None
            law("what was written is there", (after.status, after.processed_status) == _LEAVES[act.verb])
