"""How long to wait before the next attempt."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

__all__ = ["Backoff"]

#: Doublings, at most: a float can hold no more than some thousand, and a server can be away for weeks.
_DOUBLINGS = 100


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses that double from one failure to the next.

    Attributes:
        first: Seconds to wait after the first failure.
        longest: Seconds that no pause exceeds.
    """

    first: float
    longest: float = math.inf

    def pause(self, failures: int) -> float:
        """Return the seconds to wait after so many failures in a row, at least 1."""
        return min(self.first * 2.0 ** min(failures - 1, _DOUBLINGS), self.longest)

    def random_pause(self, failures: int) -> float:
        """Return a random part of the pause, so that those who collided do not meet again."""
        return random.uniform(0, self.pause(failures))  # noqa: S311 - keeps no secret
