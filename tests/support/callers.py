"""Processes that make the same calls at the same moment, as the web servers of a site do when a customer presses twice."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

from tests.support.apps import AppSpec, close_app

__all__ = ["Callers", "Outcome", "start_callers"]

#: Seconds for which a process waits for the others, and for each result.
TIMEOUT = 90.0

#: Calls after which the processes meet again, so that they do not drift apart.
TOGETHER = 10

#: Where this process, if it is one of the callers, meets the others.
_meeting: Barrier | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one process got for one call.

    Attributes:
        message_id: The id that it called with.
        task_id: The Celery id of the AsyncResult that it was given.
        duplicate: Whether the AsyncResult said so.
        value: What ``.get()`` gave.
    """

    message_id: str
    task_id: str
    duplicate: bool
    value: Any


class Callers:
    """Some processes that keep in step as they call."""

    def __init__(self, pool: ProcessPoolExecutor, meeting: Barrier) -> None:
        self._pool = pool
        self._meeting = meeting

    def call(self, spec: AppSpec, task: str, message_ids: Sequence[str]) -> list[list[Outcome]]:
        """Have every process call a task once per message id, with the id as its argument too.

        Returns:
            The outcomes of each process, in the order of the ids.
        """
        if self._meeting.broken:
            self._meeting.reset()
        jobs = [self._pool.submit(_call, spec, task, list(message_ids)) for _ in range(self._meeting.parties)]
        return [job.result(timeout=TIMEOUT * 2) for job in jobs]


@contextmanager
def start_callers(count: int) -> Iterator[Callers]:
    """Keep ``count`` processes ready to call."""
    context = multiprocessing.get_context("spawn")
    meeting = context.Barrier(count)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_meet_at, initargs=(meeting,)) as pool:
        yield Callers(pool, meeting)


def _meet_at(meeting: Barrier) -> None:
    global _meeting  # noqa: PLW0603 - one per process, set once
    _meeting = meeting


def _call(spec: AppSpec, task: str, message_ids: list[str]) -> list[Outcome]:
    assert _meeting is not None
    app = spec.build()
    try:
        results = []
        for number, message_id in enumerate(message_ids):
            if number % TOGETHER == 0:
                _meeting.wait(TIMEOUT)
            results.append(app.tasks[task].apply_async((message_id,), message_id=message_id))
        return [
            Outcome(message_id, result.id, getattr(result, "duplicate", False), result.get(timeout=TIMEOUT))
            for message_id, result in zip(message_ids, results, strict=True)
        ]
    finally:
        close_app(app)
