"""Marks: when each task ran, in memory that all processes share. To note it costs a task a fraction of a microsecond.

A counter in Redis or a line in a file would cost each task as much as some of what is to be measured.
"""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LIMIT", "Marks", "Ran"]

#: Numbers of tasks are below this. A file of it is sparse.
LIMIT = 1 << 21

_BYTES = 8


@dataclass(frozen=True, slots=True)
class Ran:
    """When the tasks of a stretch of numbers ran.

    Attributes:
        at: By number from the first on, seconds on the monotonic clock, which processes of a machine share; 0 if it did not.
    """

    at: tuple[float, ...]

    @property
    def missing(self) -> int:
        """How many did not run."""
        return self.at.count(0.0)

    @property
    def seconds(self) -> float:
        """From the first to the last."""
        return max(self.at) - min(self.at)


class Marks:
    """A file with a place for each task's number.

    Args:
        path: The file; it is made if it is not there.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.exists():
            with path.open("wb") as fresh:
                fresh.truncate(LIMIT * _BYTES)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), LIMIT * _BYTES)
        self._at = memoryview(self._map).cast("q")

    def note(self, number: int) -> None:
        """Note that the task of this number runs now; in place 0, which no task has, if it runs again."""
        if self._at[number]:
            self._at[0] += 1
        self._at[number] = time.monotonic_ns()

    def has(self, number: int) -> bool:
        """Return whether that task has run."""
        return self._at[number] != 0

    def ran(self, first: int, count: int) -> Ran:
        """When the tasks of these numbers ran."""
        return Ran(tuple(at / 1e9 for at in self._at[first : first + count]))

    @property
    def again(self) -> int:
        """How many tasks ran that had run before. Two processes that note one at the same moment may be one too few."""
        return self._at[0]
