"""Messages that go through a store as Celery sends them: recorded, claimed, completed, each verb timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from uuid import uuid4

from celery_idempotent.core.records import Claim, Claimed, Inserted, MessageKey, NewMessage
from celery_idempotent.core.store import Store
from celery_idempotent.message.serialization import encode_message

__all__ = ["VERBS", "Times", "new_messages", "percentile", "run"]

VERBS = ("record", "claim", "complete")

_MESSAGE = encode_message(
    ("o-48213", 500, {"currency": "EUR", "customer": "c-48213", "note": "gift wrapped, leave with the neighbours"}),
    {"retry": True},
    {"queue": "celery", "routing_key": "celery", "exchange": ""},
    serializer="json",
)
_RESULT = b'{"charged": 500, "receipt": "r-48213"}'


@dataclass(slots=True)
class Times:
    """Seconds that each call of a verb took."""

    record: list[float] = field(default_factory=list)
    claim: list[float] = field(default_factory=list)
    complete: list[float] = field(default_factory=list)

    def of(self, verb: str) -> list[float]:
        times: list[float] = getattr(self, verb)
        return times

    def extend(self, others: Iterable[Times]) -> Times:
        for other in others:
            for verb in VERBS:
                self.of(verb).extend(other.of(verb))
        return self

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """Return the median and the 99th percentile of each verb."""
        return {
            verb: {"p50": 1e3 * statistics.median(times), "p99": 1e3 * percentile(times, 99)}
            for verb in VERBS
            if (times := self.of(verb))
        }


def percentile(times: Sequence[float], percent: int) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


def new_messages(count: int) -> list[NewMessage]:
    """Messages that are known by their task ids, as they are unless their task says otherwise."""
    ids = [str(uuid4()) for _ in range(count)]
    return [NewMessage(MessageKey(each, "shop.orders.task_0"), each, queue="celery", message=_MESSAGE) for each in ids]


def run(store: Store, messages: Sequence[NewMessage], *, times: Times | None = None, pause: float = 0.0) -> Times:
    """Record all of them, claim all of them, complete all of them.

    Args:
        store: The store.
        messages: As many as are in flight at once.
        times: Where the times are noted.
        pause: Seconds of rest behind each verb, for traffic that leaves a server time for something else.
    """
    times = Times() if times is None else times
    claims: list[Claim] = []
    for message in messages:
        assert _timed(times.record, pause, lambda message=message: store.record(message)) == Inserted()  # type: ignore[misc]
    for message in messages:
        answer = _timed(
            times.claim,
            pause,
            lambda message=message: store.claim(message, worker="worker-7.shop.example:20001", lease=60.0, grace=30.0),  # type: ignore[misc]
        )
        assert isinstance(answer, Claimed)
        claims.append(answer.claim)
    for claim in claims:
        assert _timed(times.complete, pause, lambda claim=claim: store.complete(claim, result=_RESULT))  # type: ignore[misc]
    return times


def _timed(times: list[float], pause: float, call: Callable[[], object]) -> object:
    began = time.perf_counter()
    answer = call()
    times.append(time.perf_counter() - began)
    if pause:
        time.sleep(pause)
    return answer
