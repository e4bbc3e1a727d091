"""Where a run takes place: private servers, and for each subject a producer and a worker that stay for the whole run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis
import sqlalchemy as sa

from benchmarks.marks import LIMIT, Marks
from benchmarks.producer import Order, Producer, Published
from benchmarks.servers import MariaDB, PostgreSQL, Redis
from benchmarks.subjects import Place, Subject
from benchmarks.usage import Meter, cpu_seconds
from celery_idempotent.stores import open_store
from tests.support.servers import PrivateServer
from tests.support.waiting import wait_until
from tests.support.worker import WorkerProcess

__all__ = ["CONCURRENCY", "Site", "Stand", "open_site"]

#: Processes of a worker's pool.
CONCURRENCY = 2

#: Where messages wait: Celery's default queue, in a database of the subject's own.
QUEUE = "celery"

#: Seconds for tasks that were published to have run.
PATIENCE = 120.0

_SERVERS: dict[str, type[PrivateServer]] = {"postgresql": PostgreSQL, "mariadb": MariaDB}


@dataclass
class Stand:
    """What one subject works with.

    Attributes:
        subject: Who works here.
        place: What its processes are told.
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

    def publish(self, count: int, *, how: str = "single", task: str = "noop") -> tuple[range, Published]:
        """Publish so many messages.

        Returns:
            Their numbers, which no other message has, and how long it took.
        """
        numbers = range(self._next, self._next + count)
        assert numbers.stop <= LIMIT, "too many messages for one run: fewer rounds, or smaller ones"
        self._next = numbers.stop
        return numbers, self.producer.publish(Order(how, task, numbers.start, count))

    def waiting(self) -> int:
        """Messages in the queue."""
        return int(self._redis.llen(QUEUE))

    def discard(self, expected: int) -> None:
        """Empty the queue.

        Raises:
            AssertionError: It does not hold as many as expected: they were not all published.
        """
        found = self.waiting()
        assert found == expected, f"{self.subject.name} was to publish {expected} messages; {found} are in its queue"
        self._redis.delete(QUEUE)

    def clear(self) -> None:
        """Forget all messages: those in the broker, the locks of some, and the rows of others. There must be no worker."""
        assert self.worker is None
        self._redis.flushdb()
        if self.place.store is None or self.place.store == self.place.redis:
            return
        engine = sa.create_engine(self.place.store, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.execute(
                sa.text("DELETE FROM queue_log" if self.subject.name == "sqlite" else "TRUNCATE queue_log")
            )

    # -- consuming --------------------------------------------------------------------------------------------------------

    def start_worker(self) -> None:
        """Start the worker, have it run some tasks in each of its processes, and pause it."""
        self.worker = WorkerProcess(
            self.directory,
            self.place.environment(),
            app="benchmarks.app",
            concurrency=CONCURRENCY,
            # Celery's own default. At INFO, two lines for each task would be the most expensive part of it.
            arguments=["--loglevel=WARNING"],
        ).start(wait=False)
        for task in ("noop", "echo", "keyless"):
            self.wait_for(self.publish(200, task=task)[0])
        self.settle()
        self.worker.pause()

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
        """A meter of the servers and of the worker, if there is one."""
        worker = {} if self.worker is None else {"worker": self.worker.pid}
        return Meter({**self.servers, **worker})


@dataclass
class Site:
    """Servers and stands.

    Attributes:
        servers: By name.
        stands: By subject, plain Celery first.
        directory: Logs, and the SQLite file.
    """

    servers: dict[str, PrivateServer]
    stands: dict[str, Stand]
    directory: Path

    def clear(self) -> None:
        """Forget all messages, of everybody."""
        for stand in self.stands.values():
            stand.clear()


@contextmanager
def open_site(subjects: Sequence[Subject]) -> Iterator[Site]:
    """Start the servers that the subjects need, and a producer for each; everything is ended and removed on the way out.

    Raises:
        NotInstalledError: A server's programs are not on this machine.
        AssertionError: A producer does not publish.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        servers: dict[str, PrivateServer] = {"redis": stack.enter_context(Redis())}
        for subject in subjects:
            if subject.name in _SERVERS:
                servers[subject.name] = stack.enter_context(_SERVERS[subject.name]())
        site = Site(servers, {}, directory)
        for database, subject in enumerate(subjects):
            site.stands[subject.name] = stand = _stand(stack, site, subject, database)
            stack.callback(stand.stop_worker)
            for task in ("noop", "echo", "keyless"):
                stand.publish(300, task=task)
            stand.discard(900)
        site.clear()
        yield site


def _stand(stack: ExitStack, site: Site, subject: Subject, database: int) -> Stand:
    broker = sa.make_url(site.servers["redis"].url).set(database=str(database)).render_as_string()
    store = None
    if subject.guarded:
        own = {"sqlite": f"sqlite:///{site.directory / 'queue_log.db'}", "redis": broker}
        store = own.get(subject.name) or site.servers[subject.name].url
        opened = open_store(store)
        opened.init()
        opened.close()
    marks = site.directory / f"{subject.name}.marks"
    place = Place(subject.name, broker, str(marks), store)
    return Stand(
        subject,
        place,
        Marks(marks),
        stack.enter_context(Producer(place, site.directory / f"{subject.name}.producer.log")),
        {name: site.servers[name].pid for name in ("redis", subject.name) if name in site.servers},
        site.directory,
    )
