"""Measurements that are taken in rounds: publishing, consuming, and how long a call takes to run."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from benchmarks.figures import Round
from benchmarks.subjects import Subject
from benchmarks.testbed import WARM, Deployment, Testbed
from tests.chaos.audit import percentile

__all__ = ["Column", "Consume", "Latency", "Measure", "Publish", "PublishBare", "shuffled"]


class Column(NamedTuple):
    """A column of a measurement's table: the median of a figure.

    Attributes:
        figure: As in the rounds.
        title: At its head.
        form: Of its values, as for ``format``.
    """

    figure: str
    title: str
    form: str = ".2f"


@dataclass(frozen=True)
class Measure(ABC):
    """A measurement that is taken in rounds, in each of which every subject has its turn.

    Attributes:
        name: As in ``--only``.
        title: What a reader is told that it is.
        count: Messages of each subject and round.
    """

    #: What is compared with plain Celery's.
    figures: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[tuple[Column, ...]] = ()
    #: Whether once is enough, because it counts.
    once: ClassVar[bool] = False

    name: str
    title: str
    count: int

    #: Whether workers are there; they are paused while it is not their turn.
    workers: ClassVar[bool] = False

    def takes(self, subject: Subject) -> bool:
        """Return whether a subject can take part."""
        return True

    @abstractmethod
    def round(self, testbed: Testbed, deployments: Mapping[str, Deployment], count: int, order: random.Random) -> Round:
        """Take it once.

        Args:
            testbed: Where they are.
            deployments: Those who take part.
            count: Messages of each.
            order: Says whose turn it is.

        Raises:
            AssertionError: A subject has not done what it was to do.
        """

    @contextmanager
    def ready(self, testbed: Testbed) -> Iterator[dict[str, Deployment]]:
        """Those who take part, with what they need."""
        deployments = {
            name: deployment for name, deployment in testbed.deployments.items() if self.takes(deployment.subject)
        }
        if not self.workers:
            for deployment in deployments.values():
                deployment.stop_worker()
            testbed.clear()
        for deployment in deployments.values():
            if self.workers and deployment.worker is None:
                deployment.start_worker()
        yield deployments


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

    figures = ("per second",)
    columns: ClassVar[tuple[Column, ...]] = (
        Column("per second", "per second", ",.0f"),
        Column("cpu", "CPU, ms"),
        Column("cpu producer", "producer"),
        Column("cpu redis", "Redis"),
        Column("cpu database", "database"),
    )

    def takes(self, subject: Subject) -> bool:
        if self.how in {"batch", "group-batch", "bare"}:
            return subject.kind != "peer"
        return self.task in subject.tasks and (self.how != "group" or subject.has_groups)

    def round(self, testbed: Testbed, deployments: Mapping[str, Deployment], count: int, order: random.Random) -> Round:
        total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        share = max(count // self.turns, 1)
        for _ in range(self.turns):
            for deployment in shuffled(deployments, order):
                sums, meter = total[deployment.subject.name], deployment.meter()
                _, published = deployment.publish(share, how=self.how, task=self.task)
                sums["seconds"] += published.seconds
                sums["producer"] += published.cpu
                for name, seconds in meter.read().items():
                    sums[name] += seconds
        for deployment in deployments.values():
            deployment.discard(self.turns * share)
        return {name: per_message(sums, self.turns * share) for name, sums in total.items()}


@dataclass(frozen=True)
class PublishBare(Publish):
    """The same behind the driver's own record, see :mod:`benchmarks.bare`. What is made ready for that is not timed, but the servers compute it."""

    how: str = "bare"

    columns = (Column("per second", "per second", ",.0f"), Column("cpu producer", "producer, CPU ms"))


@dataclass(frozen=True)
class Consume(Measure):
    """Tasks per second of one worker with a pool of processes, from a queue that was filled before.

    From the first body to the last; the worker has been started, and has run tasks, before.

    Attributes:
        task: Which task.
        how: The way in which the queue is filled.
    """

    task: str = "noop"
    how: str = "batch"

    workers = True
    figures = ("per second",)
    columns: ClassVar[tuple[Column, ...]] = (
        Column("per second", "per second", ",.0f"),
        Column("cpu", "CPU, ms"),
        Column("cpu worker", "main process"),
        Column("cpu worker pool", "pool"),
        Column("cpu redis", "Redis"),
        Column("cpu database", "database"),
    )

    def round(self, testbed: Testbed, deployments: Mapping[str, Deployment], count: int, order: random.Random) -> Round:
        found: dict[str, Mapping[str, float]] = {}
        for deployment in shuffled(deployments, order):
            share = deployment.subject.share(count)
            numbers, _ = deployment.publish(share, how=self.how, task=self.task)
            meter = deployment.run(numbers)
            seconds = deployment.marks.ran(numbers.start, share).seconds
            found[deployment.subject.name] = per_message({"seconds": seconds, **meter.read()}, share)
            stored = self.task == "echo" or not deployment.subject.ignores_results
            results, expected = deployment.take_results(), share if stored else 0
            assert results == expected, f"{deployment.subject.name} stored {results} results, not {expected}"
        return found


@dataclass(frozen=True)
class ConsumeBare(Consume):
    """The same between the driver's own claim and completion, see :mod:`benchmarks.bare`."""

    task: str = "between"
    how: str = "between"

    columns = (Column("per second", "per second", ",.0f"), Column("cpu", "CPU, ms"))

    def takes(self, subject: Subject) -> bool:
        return subject.kind != "peer"

    @contextmanager
    def ready(self, testbed: Testbed) -> Iterator[dict[str, Deployment]]:
        with super().ready(testbed) as deployments:
            for deployment in deployments.values():  # each process of a pool learns the statements
                deployment.run(deployment.publish(WARM, how=self.how, task=self.task)[0])
            yield deployments


@dataclass(frozen=True)
class Latency(Measure):
    """How long it takes from the moment at which a call is due to the body, at a rate that leaves the machine some time.

    Attributes:
        rate: Calls per second, each due at its time whether or not the ones before are late.
    """

    rate: float = 200.0

    workers = True
    figures = ("p50", "p99")
    columns = (Column("p50", "p50, ms", ".1f"), Column("p99", "p99, ms", ".1f"))

    def takes(self, subject: Subject) -> bool:
        return not subject.slow

    def round(self, testbed: Testbed, deployments: Mapping[str, Deployment], count: int, order: random.Random) -> Round:
        found: dict[str, Mapping[str, float]] = {}
        for deployment in shuffled(deployments, order):
            assert deployment.worker is not None
            deployment.worker.resume()
            numbers, published = deployment.publish(count, rate=self.rate)
            deployment.wait_for(numbers)
            deployment.settle()
            deployment.worker.pause()
            ran = deployment.marks.ran(numbers.start, count).at
            late = sorted((at - published.began - place / self.rate) * 1e3 for place, at in enumerate(ran))
            found[deployment.subject.name] = {"p50": percentile(late, 50), "p99": percentile(late, 99)}
        return found


def shuffled(deployments: Mapping[str, Deployment], order: random.Random) -> list[Deployment]:
    """In an order that favours nobody."""
    return order.sample(list(deployments.values()), len(deployments))


def per_message(sums: Mapping[str, float], count: int) -> dict[str, float]:
    """Return what a round came to: messages per second, and milliseconds of CPU for each message, by who computed."""
    spent = {name: seconds / count * 1e3 for name, seconds in sums.items() if name != "seconds"}
    cpu = {f"cpu {name if name in _COMPUTE else 'database'}": milliseconds for name, milliseconds in spent.items()}
    return {"per second": count / sums["seconds"], "cpu": sum(cpu.values()), **cpu}


#: Who computes; whoever else does is a database.
_COMPUTE = ("producer", "worker", "worker pool", "redis")
