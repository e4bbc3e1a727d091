"""What a run of chaos sends, and what is done to it meanwhile: all of it follows from the seed.

A sending is one call of a task or of a canvas; its steps are the messages that have to run for it. Faults are tied to the number of
sendings that went before them, not to the clock, so a slow machine meets as many as a fast one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

__all__ = [
    "FAULTS",
    "KILLS",
    "LEASE",
    "TIME_LIMIT",
    "TRANSACTIONS",
    "Fault",
    "Plan",
    "Sending",
    "Step",
    "make_plan",
    "message_id",
]

#: Seconds. Some bodies take longer.
LEASE = 6.0

#: Seconds after which a gevent worker ends a body of the kind ``limited``. The others of that kind take a tenth of it at most. A hard limit
#: counts from the delivery, and ends a message that waits for its claim as well: it is longer than a server is away.
TIME_LIMIT = 2 * LEASE

#: Kinds of sendings, and how many of each there are in a hundred or so.
SENDINGS: Mapping[str, int] = {
    "plain": 30,
    "slow": 10,
    "early": 8,
    "at_most_once": 6,
    "retrying": 8,
    "failing": 4,
    "eta": 6,
    "chain": 6,
    "chord": 5,
    "linked": 5,
    "atomic": 10,
    "outbox": 10,
    "by_name": 6,
    "mixed": 5,
    "revocable": 6,
    "expiring": 5,
    "limited": 6,
}

#: Those whose second call may be one by name; of a chain the first step is called.
_COPIED_BY_NAME = frozenset({"plain", "slow", "early", "at_most_once", "retrying", "failing", "chain", "mixed"})

#: Those that need a database for the store: what they write is committed with their message.
TRANSACTIONS = frozenset({"atomic", "outbox"})

#: Of each kind of fault that kills: how many in a hundred kills.
KILLS: Mapping[str, int] = {
    "kill a child": 46,
    "kill a worker": 24,
    "kill a main process": 8,
    "terminate a child": 6,
    "kill the sender": 8,
    "kill a gevent worker": 4,
    "terminate a message": 4,
}

#: Of each other kind of fault: how many there are for a hundred kills; at least one of each.
FAULTS: Mapping[str, int] = {
    "shut down a worker": 10,
    "shut down a worker cold": 4,
    "pause a worker": 6,
    "pause a worker past its lease": 6,
    "cut the store's connections": 8,
    "restart the store": 3,
    "kill the store": 3,
    "pause the store": 4,
    "cut the broker's connections": 6,
    "restart the broker": 2,
    "kill the broker": 2,
    "pause the broker": 3,
    "put copies on the broker": 40,
    "revoke messages": 20,
}


@dataclass(frozen=True, slots=True)
class Step:
    """A message that has to run.

    Attributes:
        key: What its body notes in the ledger, and returns.
        retries: How often its body retries before it returns.
        fails: Whether its body raises.
        at_most_once: Whether it may end abandoned instead, when its owner died.
        atomic: Whether its body writes an effect, in the transaction in which it is completed.
        ordered: Whether it is sent in a transaction that writes an order.
        sent_by: Key of the atomic step whose transaction sends it.
        expires: Whether it may end expired instead: before its body began, or when its owner died.
    """

    key: str
    retries: int = 0
    fails: bool = False
    at_most_once: bool = False
    atomic: bool = False
    ordered: bool = False
    sent_by: str | None = None
    expires: bool = False


@dataclass(frozen=True, slots=True)
class Sending:
    """One call.

    Attributes:
        number: Its place in the plan, from 0.
        kind: One of :data:`SENDINGS`.
        seconds: How long each of its bodies takes.
        retries: For ``retrying``.
        countdown: Seconds, for ``eta`` and ``retrying``; not less than one but 0, which Celery refuses on quorum queues. For
            ``expiring`` the seconds until it expires.
        again: Whether the caller calls a second time at once, as one does that had no answer.
        rolled_back: Whether an ``outbox`` is rolled back, so that nothing has to run for it, and nothing may.
    """

    number: int
    kind: str
    seconds: float
    retries: int
    countdown: float
    again: bool
    rolled_back: bool = False

    @property
    def key(self) -> str:
        """What tells it from others."""
        return f"{self.kind}-{self.number}"

    @property
    def copied_by_name(self) -> bool:
        """Whether the second call is one by name, to another queue: what comes of it is a copy under a task id of its own."""
        return self.again and self.number % 2 == 0 and self.kind in _COPIED_BY_NAME

    def steps(self) -> list[Step]:
        """Return what has to run for it, in the order of its ``apply_async``."""
        match self.kind:
            case "chain":
                return [Step(f"{self.key}.{place}") for place in range(3)]
            case "chord":
                return [*(Step(f"{self.key}.{place}") for place in range(3)), Step(f"{self.key}.body")]
            case "linked":
                return [Step(self.key), Step(f"{self.key}.link")]
            case "atomic":
                return [Step(self.key, atomic=True), Step(f"{self.key}.child", sent_by=self.key)]
            case "outbox":
                return [] if self.rolled_back else [Step(self.key, ordered=True)]
            case _:
                return [
                    Step(
                        self.key,
                        retries=self.retries if self.kind == "retrying" else 0,
                        fails=self.kind == "failing" or (self.kind == "limited" and self.seconds > TIME_LIMIT),
                        at_most_once=self.kind == "at_most_once",
                        expires=self.kind == "expiring",
                    )
                ]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is done to the servers, the workers or the sender.

    Attributes:
        after: How many sendings have been sent by then.
        kind: One of :data:`KILLS` or :data:`FAULTS`.
        choice: In [0, 1): which worker, how long, how many.
    """

    after: int
    kind: str
    choice: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A run of chaos, before it is run."""

    seed: int
    sendings: tuple[Sending, ...]
    faults: tuple[Fault, ...]

    def steps(self) -> dict[str, Step]:
        """Everything that has to run, by its key."""
        return {step.key: step for sending in self.sendings for step in sending.steps()}

    def rolled_back(self) -> set[str]:
        """Return what must never run, nor have an order."""
        return {sending.key for sending in self.sendings if sending.rolled_back}


def make_plan(seed: int, *, tasks: int, kills: int, transactions: bool = True) -> Plan:
    """Make a plan.

    Args:
        seed: The same seed makes the same plan.
        tasks: Messages to send at least, those of canvases and the callers' second calls not counted twice.
        kills: Processes killed: pool children, whole workers, main processes, senders.
        transactions: Whether :data:`TRANSACTIONS` are among what is sent.
    """
    rng = random.Random(seed)
    kinds_sent = {kind: share for kind, share in SENDINGS.items() if transactions or kind not in TRANSACTIONS}
    sendings: list[Sending] = []
    steps = 0
    while steps < tasks:
        sending = _sending(rng, len(sendings), kinds_sent)
        sendings.append(sending)
        steps += len(sending.steps())
    kinds = [*islice(_shares(KILLS), kills)] if kills else []
    kinds += [kind for kind, share in FAULTS.items() if kills for _ in range(max(1, round(share * kills / 100)))]
    rng.shuffle(kinds)
    # Something has been sent before the first, and something is still to be sent after the last. Each has a stretch of its own: a
    # row of kills that leaves no worker shows how fast workers start.
    places = [0.02 + 0.96 * (place + rng.random()) / len(kinds) for place in range(len(kinds))]
    faults = [
        Fault(round(place * len(sendings)), kind, rng.random()) for place, kind in zip(places, kinds, strict=True)
    ]
    return Plan(seed, tuple(sendings), tuple(faults))


def _sending(rng: random.Random, number: int, shares: Mapping[str, int]) -> Sending:
    (kind,) = rng.choices(list(shares), list(shares.values()))
    quick = rng.choice((0.0, 0.0, 0.01, 0.05))
    seconds = {
        # One in eight outlives its lease.
        "slow": rng.uniform(1.1, 1.3) * LEASE if rng.random() < 0.125 else rng.uniform(0.2, 1.0),
        "early": rng.uniform(0.0, 0.3),
        "at_most_once": rng.uniform(0.0, 0.3),
        # Its lease is renewed outside its transaction.
        "atomic": rng.uniform(1.1, 1.3) * LEASE if rng.random() < 0.04 else rng.uniform(0.0, 0.4),
        # Long enough to be revoked, or to expire, while they run.
        "revocable": rng.uniform(0.5, 3.0),
        "expiring": rng.uniform(0.2, 3.0),
        "limited": 10 * TIME_LIMIT if rng.random() < 0.2 else rng.uniform(0.0, 0.1) * TIME_LIMIT,
    }.get(kind, quick)
    return Sending(
        number=number,
        kind=kind,
        seconds=round(seconds, 3),
        retries=rng.randint(1, 3),
        countdown=rng.choice((0.0, 1.0)) if kind == "retrying" else round(rng.uniform(1.0, 1.5 * LEASE), 2),
        again=rng.random() < 0.1 and kind not in {"revocable", "expiring"},
        rolled_back=rng.random() < 0.2 and kind == "outbox",
    )


def _shares(shares: Mapping[str, int]) -> Iterator[str]:
    """Each kind as often as its share says, evenly mixed, for as long as one asks."""
    given: Counter[str] = Counter()
    while True:
        kind = min(shares, key=lambda kind: (given[kind] + 1) / shares[kind])
        given[kind] += 1
        yield kind


def message_id(key: str) -> str:
    """Return the id under which a step is sent: a caller that calls again says the same."""
    return f"chaos-{key}"
