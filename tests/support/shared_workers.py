"""Workers that many tests share, each test under message ids of its own: a worker takes seconds of a processor to start.

``open_shared_worker`` starts one on a Redis and an SQLite file; ``open_both_workers`` starts a guarded and a plain one side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery
from celery.result import AsyncResult

from celery_idempotent.queue_log import QueueLog
from tests.support.apps import AppSpec, close_app
from tests.support.brokers import Broker, redis_broker
from tests.support.captured import Captured, capture, put
from tests.support.deployment import Deployment, unique
from tests.support.ledger import Entry
from tests.support.servers import PrivateRedis
from tests.support.stores import sqlite_store
from tests.support.waiting import wait_until
from tests.support.worker import Pool, WorkerProcess

__all__ = ["GuardedAndPlain", "SharedWorker", "open_both_workers", "open_shared_worker"]

#: Seconds: longer than any body of a guarded and a plain worker takes to run, and how long a copy may be held behind it.
LEASE = 5.0


@dataclass
class SharedWorker(Deployment):
    """An app with its running worker.

    Attributes:
        worker: The worker.
    """

    worker: WorkerProcess
    _apps: list[Celery] = field(default_factory=list)

    @property
    def spare_queue(self) -> str:
        """A queue without a worker, to look at messages and to repeat them."""
        return f"{self.spec.queue}-aside"

    def close(self) -> None:
        """Close the app and its producers."""
        for app in (self.app, *self._apps):
            close_app(app)

    # -- sending -----------------------------------------------------------------------------------------------------------

    def producer(self, *, base: str = "idempotent", broker: str | None = None, **settings: Any) -> Celery:
        """Return another app for the same worker and store, with settings of its own; it is closed with the worker.

        Args:
            base: ``plain`` for a producer that does not have this library.
            broker: Another broker's URL.
            settings: Over those of the worker's app.
        """
        kept = {name: value for name, value in self.spec.settings.items() if not name.startswith("idempotent_")}
        app = replace(
            self.spec,
            base=base,  # type: ignore[arg-type]
            broker=broker or self.spec.broker,
            settings={**(kept if base == "plain" else self.spec.settings), **settings},
        ).build()
        self._apps.append(app)
        return app

    def deliver(
        self,
        task: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        message_id: str | None = None,
        task_id: str | None = None,
        **options: Any,
    ) -> Any:
        """Put a message on the broker as another program would, past every check: a copy, when its ids are known.

        Returns:
            The AsyncResult.
        """
        foreign = next((app for app in self._apps if app.main == "foreign"), None)
        if foreign is None:
            foreign = self.producer(base="plain")
            foreign.main = "foreign"
        properties = {} if message_id is None else {"message_id": message_id}
        return foreign.tasks[task].apply_async(args, dict(kwargs or {}), task_id=task_id, **properties, **options)

    def copies(self, send: Callable[[str], AsyncResult[Any]], *, count: int = 1) -> tuple[Any, list[Captured]]:
        """Send something to the spare queue, and take it from there: what was returned, and ``count`` messages."""
        result = send(self.spare_queue)
        return result, capture(self.app, self.spare_queue, count)

    def put(self, messages: Sequence[Captured], *, times: int = 1) -> None:
        """Put messages where the worker looks, each so many times."""
        put(self.app, self.spec.queue, messages, times=times)

    def calls_until_it_runs(self, task: str, *args: Any) -> AsyncResult[Any]:
        """Call a task until the call is not a duplicate any more, and return that call's result."""

        def call() -> AsyncResult[Any] | None:
            result: Any = self.task(task).delay(*args)
            return None if result.duplicate else result

        return wait_until(call, interval=0.2, describe=f"a call of {task} that is no duplicate")

    # -- looking -----------------------------------------------------------------------------------------------------------

    def starts_under(self, key: str) -> list[Entry]:
        """Return the bodies that were started under a key, whatever their task and message."""
        return [entry for entry in self.ledger.starts() if entry.detail == key]

    def ends_under(self, key: str) -> list[Entry]:
        """Return the bodies that returned under a key."""
        return [entry for entry in self.ledger.ends() if entry.detail == key]

    def wait_for_starts_under(self, key: str, count: int) -> None:
        """Wait until a body was started so many times."""
        wait_until(
            lambda: len(self.starts_under(key)) >= count,
            describe=lambda: f"{count} starts under {key}: {self.starts_under(key)}\n{self.worker.log_tail()}",
        )

    def wait_for_note(self, task: str, detail: str) -> Entry:
        """Wait for the note that a task made with a text of its own."""

        def noted() -> Entry | None:
            return next((note for note in self.ledger.entries(task=task) if note.detail == detail), None)

        return wait_until(noted, describe=f"a note of {task} with {detail!r}")

    def wait_until_held(self, task: str, message_id: str, seconds: str = "") -> None:
        """Wait until the worker says that it holds a copy of a message, for so many seconds."""
        self.worker.wait_for_log(f"{task}[{message_id}] is held for {seconds}")

    def wait_until_idle(self, *others: WorkerProcess) -> None:
        """Wait until the worker (and others on its queue) took all that was sent, and has nothing to run now or later.

        What is counted after that stays as it is.
        """
        assert self.task("once").delay(unique("last")).get(timeout=60.0)
        nodes = [worker.hostname for worker in (self.worker, *others)]
        inspect = self.app.control.inspect(destination=nodes, limit=len(nodes), timeout=10.0)

        def idle() -> bool:
            answers = [ask() for ask in (inspect.scheduled, inspect.reserved, inspect.active)]
            return all(answer == {node: [] for node in nodes} for answer in answers)

        wait_until(idle, describe=lambda: f"nothing left to do:\n{self.worker.log_tail()}")


@contextmanager
def open_shared_worker(
    directory: Path,
    tasks: Sequence[str],
    *,
    settings: Mapping[str, Any] | None = None,
    pool: Pool = "prefork",
    concurrency: int = 3,
    environment: Mapping[str, str] | None = None,
) -> Iterator[SharedWorker]:
    """Yield a worker that is ready, on a Redis and an SQLite file of its own.

    Args:
        directory: For the files.
        tasks: The modules of its tasks.
        settings: Celery and ``idempotent_*`` settings.
        pool: The worker's pool.
        concurrency: How many tasks it runs at once.
        environment: For the worker, besides.

    Raises:
        NotInstalledError: There is no Redis on this machine.
    """
    with ExitStack() as stack:
        redis = stack.enter_context(PrivateRedis())
        spec = AppSpec(
            broker="",
            backend=redis.url,
            store=sqlite_store(directory),
            queue="",
            ledger=str(directory / "ledger.jsonl"),
            tasks=tuple(tasks),
            settings=dict(settings or {}),
        )
        options = {"pool": pool, "concurrency": concurrency}
        worker = _start(stack, spec, redis_broker(redis.url), environment or {}, **options)
        worker.worker.wait_until_ready()
        yield worker


@dataclass(frozen=True)
class GuardedAndPlain:
    """The same tasks, guarded and plain, on brokers of one kind."""

    guarded: SharedWorker
    plain: SharedWorker


@contextmanager
def open_both_workers(
    directory: Path, *, backend: str, store: str, guarded: Broker, plain: Broker
) -> Iterator[GuardedAndPlain]:
    """Start both workers; everything is stopped and closed in the end."""
    with ExitStack() as stack:
        both = []
        for base, broker in (("idempotent", guarded), ("plain", plain)):
            spec = AppSpec(
                broker="",
                backend=backend,
                store=store,
                queue="",
                ledger=str(directory / f"{base}.jsonl"),
                base=base,  # type: ignore[arg-type]
                tasks=("tests.support.apps.scenarios", "tests.support.apps.retrying"),
                settings={
                    # The workers' children, and so what they were doing, are lost to no one here: no claim has to be waited for.
                    "task_acks_late": True,
                    "task_reject_on_worker_lost": True,
                    **({"idempotent_lease": LEASE} if base == "idempotent" else {}),
                },
            )
            hostname = f"{base}-{uuid4().hex[:8]}@test"
            both.append(_start(stack, spec, broker, {}, concurrency=2, hostname=hostname))
            broker.other_queue("aside")
        for shared_worker in both:
            shared_worker.worker.wait_until_ready()
        yield GuardedAndPlain(*both)


def _start(
    stack: ExitStack, spec: AppSpec, broker: Broker, environment: Mapping[str, str], **options: Any
) -> SharedWorker:
    """Start a worker on a broker, and do not wait for it."""
    spec = replace(
        spec,
        broker=broker.url,
        queue=broker.queue,
        transport_options=broker.transport_options,
        settings={**broker.settings, **spec.settings},
    )
    app = spec.build()
    app.finalize()
    if spec.base == "idempotent":
        QueueLog.of(app).init()
    worker = WorkerProcess(Path(spec.ledger).parent, {**spec.environment(), **environment}, **options)
    shared_worker = SharedWorker(spec, app, worker)
    stack.callback(shared_worker.close)
    stack.callback(worker.stop)
    worker.start(wait=False)
    return shared_worker
