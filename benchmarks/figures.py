"""Arithmetic: ratios by round, their median and their spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Round", "Spread", "ratios", "spread", "values"]

#: What one round found: of each subject, figures by name.
Round = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of some figures, and how far they lie apart.

    Attributes:
        median: Half of them are below.
        low, high: The least and the greatest.
    """

    median: float
    low: float
    high: float


def spread(found: Sequence[float]) -> Spread | None:
    """Of some figures; of none there is none."""
    return Spread(median(found), min(found), max(found)) if found else None


def values(rounds: Sequence[Round], figure: str, subject: str) -> list[float]:
    """Return a subject's figure, round by round."""
    return [found[subject][figure] for found in rounds if figure in found.get(subject, {})]


def ratios(rounds: Sequence[Round], figure: str, subject: str, base: str) -> list[float]:
    """Return a subject's figure over another one's, each round on its own: what slows a round down slows down both."""
    return [
        found[subject][figure] / found[base][figure]
        for found in rounds
        if figure in found.get(subject, {}) and figure in found.get(base, {})
    ]
