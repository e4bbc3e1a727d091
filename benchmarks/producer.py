"""A producer: a process that publishes when it is told to, and says how long that took.

It reads orders, one line of JSON each, and answers each with a line. So it stays warm between the turns of the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from benchmarks.subjects import Place, subject_named
from tests.support.worker import ROOT

__all__ = ["Order", "Producer", "Published"]


@dataclass(frozen=True, slots=True)
class Order:
    """What to publish.

    Attributes:
        how: ``single`` calls, one ``group``, or one ``batch``; see :data:`benchmarks.app.WAYS`.
        task: Which task.
        first: The number of the first message.
        count: How many; each has its own number.
        rate: How many per second, at equal distances; ``None`` for as fast as can be.
    """

    how: str
    task: str
    first: int
    count: int
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """How long it took.

    Attributes:
        began: By the monotonic clock, which processes of a machine share.
        seconds: Until the last call had returned.
        cpu: Seconds that the process computed, in all its threads.
    """

    began: float
    seconds: float
    cpu: float


class Producer:
    """The process, as the one who orders sees it. Use as a context manager.

    Args:
        place: What it is to publish with, and where.
        log: Where its standard error goes.
    """

    def __init__(self, place: Place, log: Path) -> None:
        self.log = log
        self._environment = {**os.environ, **place.environment()}

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.producer"],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def publish(self, order: Order) -> Published:
        """Have it publish, and wait until it has.

        Raises:
            AssertionError: It failed; the text ends with its log.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:  # its last words come behind the end of its answers
            self._process.wait(timeout=30)
        assert answer, f"a producer ended:\n{self.log.read_text(errors='replace')[-3000:]}"
        return Published(**json.loads(answer))


# -- in the process itself -----------------------------------------------------------------------------------------------------


def publish(order: Order) -> Published:
    """Publish here and now."""
    ways: Any = import_module(subject_named(Place.of_this_process().subject).tasks_module)
    numbers = range(order.first, order.first + order.count)
    way = ways.WAYS[order.how]
    if hasattr(way, "prepare"):
        way.prepare(numbers)
    cpu, began = time.process_time(), time.monotonic()
    way(order.task, _paced(numbers, began, order.rate) if order.rate else numbers)
    return Published(began, time.monotonic() - began, time.process_time() - cpu)


def _paced(numbers: range, began: float, rate: float) -> Iterator[int]:
    for place, number in enumerate(numbers):
        time.sleep(max(began + place / rate - time.monotonic(), 0.0))
        yield number


def main() -> None:
    """Do as one is told, until nobody tells anything more."""
    # What anybody prints is not to be taken for an answer.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for line in sys.stdin:
            answers.write(json.dumps(asdict(publish(Order(**json.loads(line))))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
