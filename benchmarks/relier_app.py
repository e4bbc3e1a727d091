"""The tasks that relier runs, in its own app: ``celery -A relier.tasks.app worker --include=benchmarks.relier_app``.

As its quickstart has them: coroutines, ``idempotent=True``, sent with ``apush``, one behind the other in one event loop. (``push``, for code
that is not asynchronous, makes an event loop for each call.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from relier import rl_task

from benchmarks.marks import Marks
from benchmarks.subjects import Place

marks = Marks(Place.of_this_process().marks)


@rl_task(name="noop", idempotent=True)
async def noop(number: int) -> None:
    """Nothing."""
    marks.note(number)


@rl_task(name="echo", idempotent=True)
async def echo(number: int) -> int:
    """Return a result, which is stored."""
    marks.note(number)
    return number


_TASKS: Mapping[str, Any] = {"noop": noop, "echo": echo}
# Its connections belong to the loop that opened them.
_loop = asyncio.new_event_loop()


def _single(name: str, numbers: Iterable[int]) -> None:
    task = _TASKS[name]

    async def push_each() -> None:
        for number in numbers:
            await task.apush(number)

    _loop.run_until_complete(push_each())


WAYS: Mapping[str, Callable[[str, Iterable[int]], None]] = {"single": _single, "batch": _single}
