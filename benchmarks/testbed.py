"""The testbed of a run: private servers, and for each subject a producer and a worker that stay for the whole run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import redis
import sqlalchemy as sa

from benchmarks.marks import LIMIT, Marks
from benchmarks.producer import Order, Producer, Published
from benchmarks.rows import clear
from benchmarks.servers import MariaDB, PostgreSQL, Redis
from benchmarks.subjects import PEERS, PLAIN, STORES, Place, Subject
from benchmarks.usage import Meter, cpu_seconds
from celery_idempotent.stores import open_store
from tests.support.effects import Effects
from tests.support.servers import PrivateServer
from tests.support.waiting import wait_until
from tests.support.worker import WorkerProcess

__all__ = ["CONCURRENCY", "Deployment", "Testbed", "open_testbed"]

#: Processes of a worker's pool.
CONCURRENCY = 2

#: Messages of each task by which a process is warmed up.
WARM = 300

#: Seconds for tasks that were published to have run.
PATIENCE = 120.0

_SERVERS: dict[str, type[PrivateServer]] = {"postgresql": PostgreSQL, "mariadb": MariaDB}


@dataclass
class Deployment:
    """The processes and servers of one subject.

    Attributes:
        subject: What is measured.
        place: The settings of its processes.
        marks: Where its tasks note that they ran.
        producer: The process that publishes.
        servers: Process ids of the servers that work for it, by name.
        directory: For logs.
    """

    subject: Subject
    place: Place
    marks: Marks
    producer: Producer
    servers: dict[str, int]
    directory: Path
    worker: WorkerProcess | None = None
    _next: int = field(default=1)

    def __post_init__(self) -> None:
        self._redis = redis.Redis.from_url(self.place.redis)

    # -- publishing -------------------------------------------------------------------------------------------------------

    def publish(
        self, count: int, *, how: str = "single", task: str = "noop", rate: float | None = None
    ) -> tuple[range, Published]:
        """Publish so many messages.

        Returns:
            Their numbers, which no other message has, and how long it took.
        """
        numbers = range(self._next, self._next + count)
        assert numbers.stop <= LIMIT, "too many messages for one run: fewer rounds, or smaller ones"
        self._next = numbers.stop
        return numbers, self.producer.publish(Order(how, task, numbers.start, count, rate))

    def waiting(self) -> int:
        """Messages in the queue."""
        return int(self._redis.llen(self.subject.queue))

    def discard(self, expected: int) -> None:
        """Empty the queue.

        Raises:
            AssertionError: It does not hold as many as expected: they were not all published.
        """
        found = self.waiting()
        assert found == expected, f"{self.subject.name} was to publish {expected} messages; {found} are in its queue"
        self._redis.delete(self.subject.queue)

    def clear(self) -> None:
        """Forget all messages: those in the broker, the locks of some, and the rows of others. There must be no worker."""
        assert self.worker is None
        self._redis.flushdb()
        if self.place.store is not None:
            clear(self.place.store)

    # -- consuming --------------------------------------------------------------------------------------------------------

    def start_worker(self) -> None:
        """Start the worker, have it run some tasks in each of its processes, and pause it."""
        self.worker = WorkerProcess(
            self.directory,
            self.place.environment(),
            app=self.subject.worker_app,
            concurrency=CONCURRENCY,
            # Celery's own default. At INFO, two lines for each task would be the most expensive part of it.
            arguments=["--loglevel=WARNING", *self.subject.worker_arguments],
        ).start(wait=False)
        for task in self.subject.tasks:
            self.wait_for(self.publish(self.subject.share(WARM), task=task)[0])
        self.settle()
        self.take_results()
        self.worker.pause()

    def run(self, numbers: range) -> Meter:
        """Let the worker go on until it has run these, and has nothing more to do; what it computed meanwhile, and the servers."""
        assert self.worker is not None
        meter = self.meter()
        self.worker.resume()
        self.wait_for(numbers)
        self.settle()
        self.worker.pause()
        return meter

    def take_results(self) -> int:
        """Remove all results from the result backend; how many there were."""
        keys = list(self._redis.scan_iter("celery-task-meta-*", count=1000))
        return int(self._redis.delete(*keys)) if keys else 0

    def stop_worker(self) -> None:
        """End the worker, if there is one."""
        if self.worker is not None:
            self.worker.stop()
            self.worker = None

    def wait_for(self, numbers: range) -> None:
        """Wait until all of these have run.

        Raises:
            AssertionError: They have not, in time; or one of this subject's has run twice.
        """
        assert self.worker is not None
        worker = self.worker

        def have_run() -> bool:
            assert worker.is_alive, f"the worker of {self.subject.name} ended:\n{worker.log_tail()}"
            # The last one first: to ask all takes longer, on a machine that has other things to do.
            return self.marks.has(numbers[-1]) and self.marks.ran(numbers.start, len(numbers)).missing == 0

        def missing() -> str:
            return f"{self.marks.ran(numbers.start, len(numbers)).missing} of {len(numbers)} tasks of {self.subject.name}\n{worker.log_tail()}"

        wait_until(have_run, timeout=PATIENCE, describe=missing, interval=0.02)
        assert self.marks.again == 0, f"{self.marks.again} tasks of {self.subject.name} ran twice"

    def settle(self) -> None:
        """Wait until the worker has nothing more to do: what comes behind the last bodies too."""
        assert self.worker is not None
        pid, before = self.worker.pid, -1.0

        def idle() -> bool:
            nonlocal before
            last, before = before, sum(cpu_seconds(pid).values())
            return before == last

        wait_until(idle, timeout=PATIENCE, describe=f"the worker of {self.subject.name} at rest", interval=0.15)

    def meter(self) -> Meter:
        """Return a meter of the servers and of the worker, if there is one."""
        worker = {} if self.worker is None else {"worker": self.worker.pid}
        return Meter({**self.servers, **worker})


@dataclass
class Testbed:
    """Servers and deployments.

    Attributes:
        directory: Logs, and the SQLite file.
        servers: By name.
        deployments: By subject, plain Celery first.
    """

    directory: Path
    servers: dict[str, PrivateServer]
    deployments: dict[str, Deployment] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget all messages of all deployments."""
        for deployment in self.deployments.values():
            deployment.clear()

    def broker(self, subject: Subject) -> str:
        """Return a subject's database in Redis: its own, so that all can use the names that they use."""
        url = sa.make_url(self.servers["redis"].url).set(database=str(_DATABASES.index(subject.name)))
        return url.render_as_string()

    def store(self, subject: Subject) -> str | None:
        """Where a subject's queue log is, if it has one."""
        match subject.name:
            case "sqlite":
                return f"sqlite:///{self.directory / 'queue_log.db'}"
            case "redis":
                return self.broker(subject)
            case name:
                return self.servers[name].url if subject.guarded else None

    @contextmanager
    def deploy(self, subject: Subject, *, broker: str | None = None, store: str | None = None) -> Iterator[Deployment]:
        """Yield the deployment of a subject, its producer warm.

        Args:
            subject: The subject.
            broker: Another URL of its broker.
            store: Another URL of its store.

        Raises:
            AssertionError: Its producer does not publish.
        """
        marks = self.directory / f"{subject.name}-{uuid4().hex[:6]}.marks"
        place = Place(subject.name, broker or self.broker(subject), str(marks), store or self.store(subject))
        with Producer(place, marks.with_suffix(".producer.log")) as producer:
            servers = {name: self.servers[name].pid for name in ("redis", subject.name) if name in self.servers}
            deployment = Deployment(subject, place, Marks(marks), producer, servers, self.directory)
            try:
                for task in subject.tasks:
                    deployment.publish(WARM, task=task)
                deployment.discard(WARM * len(subject.tasks))
                deployment.clear()
                yield deployment
            finally:
                deployment.stop_worker()


_DATABASES = (PLAIN.name, *STORES, *PEERS)


@contextmanager
def open_testbed(subjects: Sequence[Subject]) -> Iterator[Testbed]:
    """Start the servers that the subjects need, and a producer for each; everything is ended and removed on the way out.

    Raises:
        NotInstalledError: A server's programs are not on this machine.
        AssertionError: A producer does not publish.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        kinds: dict[str, type[PrivateServer]] = {
            "redis": Redis,
            **{subject.name: _SERVERS[subject.name] for subject in subjects if subject.name in _SERVERS},
        }
        testbed = Testbed(directory, {name: stack.enter_context(kind()) for name, kind in kinds.items()})
        for subject in subjects:
            url = testbed.store(subject)
            if url is not None:
                opened = open_store(url)
                opened.init()
                opened.close()
            if url is not None and subject.has_transactions:
                Effects(url).close()
            testbed.deployments[subject.name] = stack.enter_context(testbed.deploy(subject))
        yield testbed
