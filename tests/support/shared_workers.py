"""A shared worker: one app, one worker and one store that many tests share, each under message ids of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery

from celery_idempotent.core.records import MessageKey, Row, Status
from tests.support.apps import AppSpec
from tests.support.apps import close_app as close
from tests.support.brokers import redis_broker
from tests.support.ledger import Entry, Ledger
from tests.support.servers import PrivateRedis
from tests.support.stores import sqlite_store
from tests.support.waiting import wait_until
from tests.support.worker import Pool, WorkerProcess

__all__ = ["TIMEOUT", "SharedWorker", "close", "open_shared_worker"]

#: Seconds for whatever happens at once on a machine that has nothing else to do.
TIMEOUT = 60.0


@dataclass
class SharedWorker:
    """What a test works at.

    Attributes:
        spec: The app's description; its worker is built from the same.
        app: The app, on the test's side.
        ledger: Where the tasks note what they do.
        worker: The worker that runs them; ``None`` where the test starts its own.
        directory: A folder that outlives the test.
    """

    spec: AppSpec
    app: Celery
    ledger: Ledger
    worker: WorkerProcess | None
    directory: Path
    _apps: list[Celery] = field(default_factory=list)

    def task(self, name: str) -> Any:
        """Return a task of the app."""
        return self.app.tasks[name]

    def fresh(self, what: str = "m") -> str:
        """Return a message id, or any other name, that nobody else uses."""
        return f"{what}-{uuid4().hex[:12]}"

    def path(self, what: str = "file") -> str:
        """Return the path of a file that is not there yet: a gate, a flag."""
        return str(self.directory / self.fresh(what))

    # -- other producers ---------------------------------------------------------------------------------------------------

    def producer(self, *, base: str = "idempotent", broker: str | None = None, **settings: Any) -> Celery:
        """Another app for the same worker and store, with settings of its own; closed with the shared worker.

        Args:
            base: ``plain`` for a producer that does not have this library.
            broker: Another broker's URL.
            settings: Over those of the shared worker.
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

    # -- looking -----------------------------------------------------------------------------------------------------------

    def find(self, task: str, message_id: str) -> Row | None:
        """Return the row of a message, if there is one."""
        row: Row | None = self.app.queue_log.store.find(MessageKey(message_id, task))
        return row

    def row(self, task: str, message_id: str) -> Row:
        """Return the row of a message."""
        row = self.find(task, message_id)
        assert row is not None, f"no row for {task}[{message_id}]"
        return row

    def wait_for_row(
        self, task: str, message_id: str, condition: Callable[[Row], bool], *, timeout: float = TIMEOUT
    ) -> Row:
        """Wait for the row of a message to be as wanted."""

        def as_wanted() -> Row | None:
            row = self.find(task, message_id)
            return row if row is not None and condition(row) else None

        return wait_until(as_wanted, timeout=timeout, describe=lambda: f"the row {self.find(task, message_id)}")

    def done(self, task: str, message_id: str, *, timeout: float = TIMEOUT) -> Row:
        """Wait for the row of a message to be done."""
        return self.wait_for_row(task, message_id, lambda row: row.status is Status.DONE, timeout=timeout)

    def starts(self, task: str, message_id: str) -> list[Entry]:
        """Each time that a task's body was entered for a message."""
        return [note for note in self.ledger.starts(task) if note.message_id == message_id]

    def wait_for_starts(self, task: str, message_id: str, count: int = 1) -> list[Entry]:
        """Wait for so many, and return them."""
        return wait_until(
            lambda: starts if len(starts := self.starts(task, message_id)) >= count else None,
            timeout=TIMEOUT,
            describe=lambda: f"{count} start(s) of {task}[{message_id}]; there are {self.starts(task, message_id)}",
        )

    def wait_until_held(self, task: str, message_id: str, seconds: str = "") -> None:
        """Wait until the worker says that it holds a copy of a message, for so many seconds."""
        assert self.worker is not None
        self.worker.wait_for_log(f"{task}[{message_id}] is held for {seconds}", timeout=TIMEOUT)

    def wait_for_note(self, task: str, detail: str) -> Entry:
        """Wait for the note that a task made with a text of its own."""

        def noted() -> Entry | None:
            return next((note for note in self.ledger.entries(task=task) if note.detail == detail), None)

        return wait_until(noted, timeout=TIMEOUT, describe=f"a note of {task} with {detail!r}")


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
    """Yield a shared worker on a Redis and an SQLite file of its own, with a worker that is ready.

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
    with PrivateRedis() as redis:
        broker = redis_broker(redis.url)
        ledger = Ledger(directory / "ledger.jsonl")
        spec = AppSpec(
            broker=broker.url,
            backend=redis.url,
            store=sqlite_store(directory),
            queue=broker.queue,
            ledger=str(ledger.path),
            tasks=tuple(tasks),
            transport_options=broker.transport_options,
            settings={**broker.settings, **(settings or {})},
        )
        app = spec.build()
        app.finalize()
        app.queue_log.init()
        given = {**spec.environment(), **(environment or {})}
        worker = WorkerProcess(directory, given, pool=pool, concurrency=concurrency)
        shared_worker = SharedWorker(spec, app, ledger, worker, directory)
        try:
            worker.start()
            yield shared_worker
        finally:
            worker.stop()
            for opened in (app, *shared_worker._apps):
                close(opened)
