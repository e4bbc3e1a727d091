"""Lists that are too long for one statement."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TypeVar

__all__ = ["in_batches"]

T = TypeVar("T")

#: Messages in one statement, or one round trip, at most.
_AT_ONCE = 500


def in_batches(items: Collection[T]) -> Iterator[Sequence[T]]:
    """Yield the items in their order, some hundreds at a time; nothing if there are none."""
    every = list(items)
    for first in range(0, len(every), _AT_ONCE):
        yield every[first : first + _AT_ONCE]
