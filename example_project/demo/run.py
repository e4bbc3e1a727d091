"""One run of the loan check: a worker, callers, and the tables that say what came of it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kombu.connection import Connection
from kombu.entity import Exchange, Queue

from celery_idempotent import SQLStore
from example_project.demo.accounts import Accounts
from example_project.demo.processes import DemoError, Process, wait_until
from example_project.demo.scenario import Request, script
from example_project.ledger import Ledger
from example_project.settings import Settings

#: Seconds without a change in its tables after which a run is at rest: longer than a body, a lease and a recovery interval.
QUIET = 4.0

WORKER = (
    *("celery", "-A", "example_project.celery_app", "worker", "--loglevel=INFO", "--pool=prefork", "--concurrency=4"),
    *("--without-gossip", "--without-mingle", "--include=example_project.demo.faults"),
)


class Run:
    """The loan check with one base class; a context manager whose processes are gone at the end.

    Args:
        base: ``guarded`` or ``plain``.
        mark: Tells the runs of this demo from all others on the same servers.
        directory: For the logs and files of this run.
        requests: How many customers ask.
    """

    def __init__(self, base: str, *, mark: str, directory: Path, requests: int) -> None:
        directory.mkdir()
        own = {"LOAN_BASE": base, "LOAN_RUN": f"{base}-{mark}", "LOAN_DIR": str(directory)}
        self.settings = Settings.from_environ({**os.environ, **own})
        self.book = Ledger(self.settings.store)
        self.requests: list[Request] = script(requests)
        self.directory = directory
        self._processes = ExitStack()
        self._started: Counter[str] = Counter()
        self._seen: Accounts | None = None
        self._changed = time.monotonic()

    def prepare(self) -> None:
        """Create the tables, as a deployment would with ``celery -A ... idempotent init``."""
        self.book.create()
        if self.settings.base == "guarded":
            with closing(SQLStore(self.settings.store)) as store:
                store.init()
        self._processes.callback(self._delete_queue)

    def start_worker(self) -> None:
        """Start a worker; the first, or one in the place of one that was killed."""
        self.worker = self._start("worker", *WORKER, f"--hostname={self.settings.run}@localhost")

    def start_callers(self, requests: Sequence[Request], *, pace: float = 0.0) -> None:
        """Have customers ask, so many seconds after one another."""
        numbers = [str(request.number) for request in requests]
        self.callers = self._start("callers", "example_project.demo.callers", str(pace), *numbers)

    def start_doomed_callers(self, requests: Sequence[Request]) -> None:
        """Have customers ask whose callers die, each in a process of its own."""
        self.doomed = [
            self._start("doomed", "example_project.demo.callers", "0", str(each.number)) for each in requests
        ]

    def bury_doomed_callers(self) -> None:
        """Wait until they are dead.

        Raises:
            DemoError: One is not, or died of something else.
        """
        for caller in self.doomed:
            wait_until(lambda caller=caller: caller.ended, seconds=60)  # type: ignore[misc]
            if not caller.killed:
                raise DemoError(f"a caller was not killed as it should have been; {caller.last_words}")

    def accounts(self) -> Accounts:
        return Accounts.read(self.settings, self.book)

    def look(self) -> tuple[Accounts, bool]:
        """Return the accounts as they stand, and whether the run is at rest: all have asked, and nothing happens any more.

        A guarded run whose accounts are not balanced never is. What was lost without a queue log never comes.

        Raises:
            DemoError: A process of this run has died.
        """
        if self.worker.ended or self.callers.failed:
            died = self.worker if self.worker.ended else self.callers
            raise DemoError(f"a process of the {self.settings.base} run has died; {died.last_words}")
        all_asked = self.callers.ended  # looked at first: what is read then is not older than the last call
        accounts = self.accounts()
        if accounts != self._seen:
            self._seen, self._changed = accounts, time.monotonic()
        complete = all_asked and (self.settings.base == "plain" or accounts.balanced())
        quiet = time.monotonic() - self._changed > QUIET
        return accounts, complete and quiet and not self.left_on_broker()

    def left_on_broker(self) -> int:
        """How many messages wait in this run's queue; those that a worker has taken are not among them."""
        with self._queue() as queue:
            return int(queue.queue_declare().message_count)

    def _delete_queue(self) -> None:
        with self._queue() as queue:
            queue.declare()  # kombu forgets the bindings only of queues that it has declared
            queue.delete()
            queue.exchange.delete()
            if self.settings.broker.startswith("redis"):
                channel = queue.channel
                channel.client.delete(channel.unacked_key, channel.unacked_index_key, channel.unacked_mutex_key)

    @contextmanager
    def _queue(self) -> Iterator[Any]:
        """Yield the queue of this run, as Celery declares it."""
        chosen = self.settings
        with Connection(
            chosen.broker, transport=chosen.transport, transport_options=chosen.transport_options
        ) as broker:
            queue = Queue(chosen.queue, Exchange(chosen.queue), routing_key=chosen.queue)
            yield queue.bind(broker.default_channel)

    def _start(self, name: str, *arguments: str) -> Process:
        self._started[name] += 1
        log = self.directory / f"{name}-{self._started[name]}.log"
        return self._processes.enter_context(Process(*arguments, environ=self.settings.environ(), log=log))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._processes.close()
