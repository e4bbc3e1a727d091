"""Arithmetic: ratios by round, their median and their spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Round", "Spread", "ratios", "spread"]

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


def spread(values: Sequence[float]) -> Spread | None:
    """Of some figures; of none there is none."""
    return Spread(median(values), min(values), max(values)) if values else None


def ratios(rounds: Sequence[Round], figure: str, subject: str, base: str) -> list[float]:
    """A subject's figure over another one's, each round on its own: what slows a round down slows down both."""
    return [
        found[subject][figure] / found[base][figure]
        for found in rounds
        if subject in found and base in found and figure in found[subject] and found[base].get(figure)
    ]
