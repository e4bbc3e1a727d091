"""What issue 5 asks for, and whether a run has it. The bounds are here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.figures import Spread, ratios, spread, values
from benchmarks.subjects import PLAIN, STORES

__all__ = ["TARGETS", "Target", "Verdict", "verdicts"]

#: Round trips of each task by which a count may be beyond its bound: what a worker's recovery asks by itself meanwhile.
_BY_ITSELF = 0.02


@dataclass(frozen=True, slots=True)
class Target:
    """Something that is to be reached.

    Attributes:
        number: In the issue.
        text: What is compared.
        measure, figure, subject: Where it is found.
        base: Whose figure it is divided by, round by round; ``None`` takes it as it is.
        relation, bound: What the median is to be.
    """

    number: int
    text: str
    measure: str
    figure: str
    subject: str
    base: str | None
    relation: Literal[">=", ">", "<="]
    bound: float

    @property
    def form(self) -> str:
        """How figures are printed."""
        return ".2f"

    @property
    def bound_text(self) -> str:
        """The bound, as it is printed."""
        return f"{self.relation} {self.bound:g}"

    def holds(self, value: float) -> bool:
        """Return whether a figure reaches it."""
        match self.relation:
            case ">=":
                return value >= self.bound
            case ">":
                return value > self.bound
            case "<=":
                return value <= self.bound + (_BY_ITSELF if self.measure == "trips" else 0.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run says to a target.

    Attributes:
        target: Which.
        found: The median and its spread.
        reached: Whether the median reaches it.
    """

    target: Target
    found: Spread
    reached: bool


def _rate(
    number: int, measure: str, subject: str, bound: float, *, base: str = PLAIN.name, beyond: bool = False
) -> Target:
    text = f"{measure}, {subject} / {base}"
    return Target(number, text, measure, "per second", subject, base, ">" if beyond else ">=", bound)


def _trips(text: str, figure: str, bound: float) -> list[Target]:
    return [
        Target(5, f"{text}, {name}", "trips", figure, name, None, "<=", bound) for name in STORES if name != "sqlite"
    ]


TARGETS: Sequence[Target] = (
    _rate(1, "publish", "postgresql", 0.65),
    _rate(1, "publish", "sqlite", 0.75),
    _rate(1, "publish", "redis", 0.75),
    _rate(1, "outbox", "postgresql", 0.9),
    _rate(2, "consume", "postgresql", 0.65),
    _rate(2, "consume", "redis", 0.80),
    _rate(3, "publish", "redis", 1.0, base="celery-once"),
    _rate(3, "publish", "redis", 1.0, base="celery-singleton"),
    _rate(3, "consume", "redis", 1.0, base="celery-singleton", beyond=True),
    _rate(3, "publish", "redis", 1.0, base="relier", beyond=True),
    _rate(3, "consume", "redis", 1.0, base="relier", beyond=True),
    *(Target(4, f"own code, {name} / its driver alone", "own-code", "ratio", name, None, "<=", 1.5) for name in STORES),
    *_trips("round trips of record", "publish store", 1),
    *_trips("round trips of claim, complete and renewals", "run store", 2),
    *_trips("round trips that an atomic task adds to a transaction: claim and completion", "atomic adds", 2),
    *_trips("commits that it adds", "atomic adds commits", 0),
)


def verdicts(results: Mapping[str, Any]) -> Iterator[Verdict]:
    """Of each target of which the run has the figures."""
    for target in TARGETS:
        rounds = results["measures"].get(target.measure, {}).get("rounds", ())
        found = spread(
            values(rounds, target.figure, target.subject)
            if target.base is None
            else ratios(rounds, target.figure, target.subject, target.base)
        )
        if found is not None:
            yield Verdict(target, found, target.holds(found.median))
