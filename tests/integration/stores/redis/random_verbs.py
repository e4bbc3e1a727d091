"""Anything that may be done to a few messages, at random."""

from __future__ import annotations

import random
from typing import Any

from celery_idempotent.core.records import Claim, Claimed, MessageKey, NewMessage, Owner, Status
from celery_idempotent.core.store import Store
from celery_idempotent.testing.examples import GRACE, LEASE

__all__ = ["KEYS", "call_random_verb"]

KEYS = [MessageKey(f"m{number}", "t") for number in range(6)]
QUEUES = (None, "a", "b")
VERBS = (
    *("record", "record_all", "withdraw", "resubmit", "republish", "count"),
    *(
        "claim",
        "claim",
        "take_over",
        "renew",
        "keep_steps",
        "checkpoint",
        "complete",
        "complete",
        "fail",
        "retry",
        "release",
        "expire",
    ),
    *("abandon", "cancel", "forbid", "relay", "relayed", "not_published"),
)


def call_random_verb(store: Store, chance: random.Random, claims: dict[MessageKey, Claim]) -> object:
    """Something, to some message; the answer. Nothing of it depends on how long it takes."""
    key = chance.choice(KEYS)
    row, claim = store.find(key), claims.get(key, Claim(key, 1))
    unique_for = chance.choice([None, 0.0, 3600.0])
    message = NewMessage(
        key,
        f"id-{chance.randrange(2)}",
        queue=chance.choice(QUEUES),
        attempt=chance.randrange(2),
        delay=chance.choice([None, -100.0, 0.0, 100.0]),
        published=chance.random() < 0.7,
        publish_within=chance.choice([None, 0.0, 60.0]),
        message=chance.choice([None, b"m"]),
    )
    holder: Any = chance.choice([claim, Owner(key, "w")])
    match chance.choice(VERBS):
        case "record":
            return store.record(message)
        case "record_all":
            return store.record_all([message, message])
        case "claim":
            answer = store.claim(message, worker="w", lease=LEASE, grace=GRACE)
            if isinstance(answer, Claimed):
                claims[key] = answer.claim
            return answer
        case "take_over" if row is not None:
            taken = store.take_over(row, task_id="id-2", worker="w", lease=LEASE, attempt=1)
            if taken is not None:
                claims[key] = taken.claim
            return taken
        case "renew":
            return store.renew([holder], lease=LEASE)
        case "keep_steps":
            return store.keep_steps(claim, steps=b"s")
        case "checkpoint":
            return store.checkpoint(claim, result=chance.choice([None, b"1"]), lease=chance.choice([None, LEASE]))
        case "complete":
            return store.complete(claim, result=chance.choice([None, b"2"]), unique_for=unique_for)
        case "fail":
            return store.fail(holder, error="E: no", unique_for=unique_for)
        case "retry":
            return store.retry(holder, message)
        case "release":
            return store.release(holder)
        case "expire":
            return store.expire(holder)
        case "abandon" if row is not None:
            return store.abandon(row, error="abandoned", unique_for=unique_for)
        case "cancel":
            return store.cancel(key, task_id="id-0", error="revoked", unique_for=unique_for)
        case "forbid" if row is not None:
            return store.forbid(row, error="revoked")
        case "withdraw":
            return store.withdraw(key, task_id="id-0")
        case "resubmit" if row is not None:
            return store.resubmit(row, message)
        case "republish" if row is not None and row.status is not Status.DONE:
            return store.republish(row)
        case "relay" if row is not None:
            return store.relay(row, lease=LEASE)
        case "relayed":
            store.relayed([key], published=chance.random() < 0.5)
        case "not_published" if row is not None:
            store.not_published(key, token=row.token)
        case "count":
            store.count_duplicate(key)
        case _:
            pass
    return None
