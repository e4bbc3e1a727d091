"""What is measured, one class for each kind of measurement."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.figures import Round
from benchmarks.site import Site, Stand
from benchmarks.subjects import Subject

__all__ = ["MEASURES", "Measure"]


@dataclass(frozen=True)
class Measure(ABC):
    """A measurement that is taken in rounds, in each of which every subject has its turn.

    Attributes:
        name: As in ``--only``.
        title: What a reader is told that it is.
        count: Messages of each subject and round.
    """

    name: str
    title: str
    count: int

    #: Whether workers are there; they are paused while it is not their turn.
    workers: ClassVar[bool] = False

    def takes(self, subject: Subject) -> bool:  # noqa: ARG002 - for others to say
        """Whether a subject can take part."""
        return True

    @abstractmethod
    def round(self, stands: Mapping[str, Stand], count: int, order: random.Random) -> Round:
        """Take it once.

        Args:
            stands: Those who take part.
            count: Messages of each.
            order: Says whose turn it is.

        Raises:
            AssertionError: A subject has not done what it was to do.
        """

    @contextmanager
    def ready(self, site: Site) -> Iterator[dict[str, Stand]]:
        """Those who take part, with what they need."""
        stands = {name: stand for name, stand in site.stands.items() if self.takes(stand.subject)}
        if not self.workers:
            for stand in stands.values():
                stand.stop_worker()
            site.clear()
        for stand in stands.values():
            if self.workers and stand.worker is None:
                stand.start_worker()
        yield stands


@dataclass(frozen=True)
class Publish(Measure):
    """Messages per second of one producer.

    The turns are short, and each subject has several in a round: what disturbs the machine meets all of them.

    Attributes:
        how: Of :data:`benchmarks.producer.WAYS`.
        task: Which task.
        turns: In each round.
    """

    how: str = "single"
    task: str = "noop"
    turns: int = 5

    def round(self, stands: Mapping[str, Stand], count: int, order: random.Random) -> Round:
        total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        share = max(count // self.turns, 1)
        for _ in range(self.turns):
            for stand in shuffled(stands, order):
                sums, meter = total[stand.subject.name], stand.meter()
                _, published = stand.publish(share, how=self.how, task=self.task)
                sums["seconds"] += published.seconds
                sums["producer"] += published.cpu
                for name, seconds in meter.read().items():
                    sums[name] += seconds
        for stand in stands.values():
            stand.discard(self.turns * share)
        return {name: per_message(sums, self.turns * share) for name, sums in total.items()}


@dataclass(frozen=True)
class Consume(Measure):
    """Tasks per second of one worker with a pool of processes, from a queue that was filled before.

    From the first body to the last; the worker has been started, and has run tasks, before.

    Attributes:
        task: Which task.
    """

    task: str = "noop"
    workers = True

    def round(self, stands: Mapping[str, Stand], count: int, order: random.Random) -> Round:
        found: dict[str, Mapping[str, float]] = {}
        for stand in shuffled(stands, order):
            numbers, _ = stand.publish(count, task=self.task)
            assert stand.worker is not None
            meter = stand.meter()
            stand.worker.resume()
            stand.wait_for(numbers)
            stand.settle()
            stand.worker.pause()
            ran = stand.marks.ran(numbers.start, count)
            found[stand.subject.name] = per_message({"seconds": ran.seconds, **meter.read()}, count)
        return found


def shuffled(stands: Mapping[str, Stand], order: random.Random) -> list[Stand]:
    """In an order that favours nobody."""
    return order.sample(list(stands.values()), len(stands))


def per_message(sums: Mapping[str, float], count: int) -> dict[str, float]:
    """What a round came to: messages per second, and milliseconds of CPU for each message, by who computed."""
    cpu = {f"cpu {name}": seconds / count * 1e3 for name, seconds in sums.items() if name != "seconds"}
    return {"per second": count / sums["seconds"], **cpu, "cpu": sum(cpu.values())}


MEASURES: Mapping[str, Measure] = {
    measure.name: measure
    for measure in (
        Publish("publish", "publish, one `delay` each", 2000),
        Consume("consume", "consume a no-op, prefork 2", 2000),
    )
}
