"""Waiting for a condition, with a deadline: the one place where the tests sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["TIMEOUT", "wait_until"]

#: Seconds for whatever happens at once on a machine that has nothing else to do.
TIMEOUT = 60.0

T = TypeVar("T")


def wait_until(
    predicate: Callable[[], T | None],
    *,
    timeout: float = TIMEOUT,
    describe: str | Callable[[], object] = "",
    interval: float = 0.05,
) -> T:
    """Ask again and again until the answer is true.

    Args:
        predicate: The question; its first truthy answer is returned.
        timeout: Seconds until the wait is given up; the predicate is asked at least once, and once more at the end.
        describe: What is waited for, or a function that tells the state of things; called only when time is up.
        interval: Seconds between two questions.

    Raises:
        AssertionError: Time is up. The text says what was waited for, for how long, and the last answer.
    """
    deadline = time.monotonic() + timeout
    while True:
        last_chance = time.monotonic() >= deadline
        answer = predicate()
        if answer:
            return answer
        if last_chance:
            what = describe() if callable(describe) else describe or getattr(predicate, "__name__", "condition")
            raise AssertionError(f"waited {timeout:g} s in vain for: {what} (last answer: {answer!r})")
        time.sleep(interval)
