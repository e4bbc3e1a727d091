"""Two workers with the same tasks side by side, one guarded and one of plain Celery, shared by the tests of a session.

Starting a worker takes seconds of a processor, so tests that neither kill nor configure theirs share these. What they send is
told apart by keys, message ids and task ids of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery
from celery.result import AsyncResult

from celery_idempotent.core.records import MessageKey, Row
from celery_idempotent.queue_log import QueueLog
from tests.support.apps import AppSpec, close_app
from tests.support.brokers import Broker
from tests.support.ledger import Entry, Ledger
from tests.support.waiting import wait_until
from tests.support.worker import WorkerProcess

__all__ = ["Captured", "GuardedAndPlain", "SharedWorker", "capture", "open_both_workers", "put", "unique"]

#: Seconds: longer than any body of the shared workers takes to run, and how long a copy may be held behind it.
LEASE = 5.0


def unique(what: str = "key") -> str:
    """Return a key that no other test uses."""
    return f"{what}-{uuid4().hex[:12]}"


@dataclass(frozen=True, slots=True)
class Captured:
    """A message as it lay on the broker, byte by byte."""

    body: bytes
    headers: dict[str, Any]
    properties: dict[str, Any]
    content_type: str
    content_encoding: str


def capture(app: Celery, queue: str, count: int = 1) -> list[Captured]:
    """Take messages off a queue that no worker consumes."""
    with app.connection_for_write() as connection:
        source = app.amqp.queues[queue].bind(connection.default_channel)

        def take() -> Captured:
            message = wait_until(lambda: source.get(no_ack=True), describe=f"a message in {queue}")
            properties = {
                name: message.properties[name]
                for name in ("message_id", "correlation_id", "reply_to", "delivery_mode", "priority")
                if message.properties.get(name) is not None
            }
            return Captured(
                message.body, dict(message.headers), properties, message.content_type, message.content_encoding
            )

        return [take() for _ in range(count)]


def put(app: Celery, queue: str, messages: Sequence[Captured], *, times: int = 1) -> None:
    """Put messages on the broker by hand, each so many times, past Celery and past the library.

    Confirmed: RabbitMQ forgets what a connection that is closed at once had not yet handed to a quorum queue.
    """
    options = {**app.conf.broker_transport_options, "confirm_publish": True}
    with app.connection_for_write(transport_options=options) as connection, connection.Producer() as producer:
        for message in [message for message in messages for _ in range(times)]:
            producer.publish(
                message.body,
                exchange="",
                routing_key=queue,
                headers=message.headers,
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                **message.properties,
            )


@dataclass(frozen=True)
class SharedWorker:
    """One app with its running worker.

    Attributes:
        spec: What the app and the worker were built from.
        app: The app in this process, for calling.
        worker: The worker.
        ledger: What its bodies did.
        queue: Where its worker looks.
        aside: A queue without a worker, to look at messages and to repeat them.
    """

    spec: AppSpec
    app: Celery
    worker: WorkerProcess
    ledger: Ledger
    queue: str
    spare_queue: str

    @classmethod
    def of(cls, spec: AppSpec, app: Celery, worker: WorkerProcess) -> SharedWorker:
        """Return what a test has started itself."""
        return cls(spec, app, worker, Ledger(spec.ledger), spec.queue, f"{spec.queue}-aside")

    def task(self, name: str) -> Any:
        """Return a task, to be called."""
        return self.app.tasks[name]

    def starts(self, key: str) -> list[Entry]:
        """Return the bodies that were started under a key."""
        return [entry for entry in self.ledger.starts() if entry.detail == key]

    def ends(self, key: str) -> list[Entry]:
        """Return the bodies that returned under a key."""
        return [entry for entry in self.ledger.ends() if entry.detail == key]

    def wait_for_starts(self, key: str, count: int, *, timeout: float = 60.0) -> None:
        """Wait until a body was started so many times."""
        wait_until(
            lambda: len(self.starts(key)) >= count,
            timeout=timeout,
            describe=lambda: f"{count} starts under {key}: {self.starts(key)}\n{self.worker.log_tail()}",
        )

    def calls_until_it_runs(self, task: str, *args: Any) -> AsyncResult[Any]:
        """Call a task until the call is not a duplicate any more, and answer that call's result."""

        def call() -> AsyncResult[Any] | None:
            result: Any = self.task(task).delay(*args)
            return None if result.duplicate else result

        return wait_until(call, timeout=60.0, interval=0.2, describe=f"a call of {task} that is no duplicate")

    def row(self, message_id: str, task: str) -> Row | None:
        """Return the row of a message."""
        row: Row | None = QueueLog.of(self.app).store.find(MessageKey(message_id, task))
        return row

    def settled(self, message_id: str, task: str, *, duplicates: int = 0, timeout: float = 60.0) -> Row:
        """Return the row of a message once it is done and so many copies of it were counted."""

        def settled() -> Row | None:
            row = self.row(message_id, task)
            return row if row is not None and row.status == "done" and row.duplicates >= duplicates else None

        return wait_until(
            settled,
            timeout=timeout,
            describe=lambda: f"{duplicates} copies: {self.row(message_id, task)}\n{self.worker.log_tail()}",
        )

    def copies(self, send: Callable[[str], AsyncResult[Any]], *, count: int = 1) -> tuple[Any, list[Captured]]:
        """Send something to the queue aside, and take it from there: what was returned, and ``count`` messages."""
        result = send(self.spare_queue)
        return result, capture(self.app, self.spare_queue, count)

    def put(self, messages: Sequence[Captured], *, times: int = 1) -> None:
        """Put messages where the worker looks, each so many times."""
        put(self.app, self.queue, messages, times=times)

    def wait_until_idle(self, *others: WorkerProcess, timeout: float = 60.0) -> None:
        """Wait until the worker (and others on its queue) took all that was sent, and has nothing to run now or later.

        What is counted after that stays as it is.
        """
        assert self.task("once").delay(unique("last")).get(timeout=timeout)
        nodes = [worker.hostname for worker in (self.worker, *others)]
        inspect = self.app.control.inspect(destination=nodes, limit=len(nodes), timeout=10.0)

        def idle() -> bool:
            answers = [ask() for ask in (inspect.scheduled, inspect.reserved, inspect.active)]
            return all(answer == {node: [] for node in nodes} for answer in answers)

        wait_until(idle, timeout=timeout, describe=lambda: f"nothing left to do:\n{self.worker.log_tail()}")


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
        spec = AppSpec(
            broker="",
            backend=backend,
            store=store,
            queue="",
            ledger="",
            tasks=("tests.support.apps.scenarios", "tests.support.apps.retrying"),
            # The workers' children, and so what they were doing, are lost to no one here: no claim has to be waited for.
            settings={"task_acks_late": True, "task_reject_on_worker_lost": True},
        )
        both_workers = [
            _open(stack, directory, replace(spec, base=base), broker)  # type: ignore[arg-type]
            for base, broker in (("idempotent", guarded), ("plain", plain))
        ]
        for shared_worker in both_workers:
            shared_worker.worker.wait_until_ready()
        yield GuardedAndPlain(*both_workers)


def _open(stack: ExitStack, directory: Path, spec: AppSpec, broker: Broker) -> SharedWorker:
    ledger = Ledger(directory / f"{spec.base}.jsonl")
    spec = replace(
        spec,
        broker=broker.url,
        queue=broker.queue,
        ledger=str(ledger.path),
        transport_options=broker.transport_options,
        settings={
            **spec.settings,
            **broker.settings,
            **({"idempotent_lease": LEASE} if spec.base == "idempotent" else {}),
        },
    )
    app = spec.build()
    stack.callback(close_app, app)
    if spec.base == "idempotent":
        QueueLog.of(app).init()
    worker = WorkerProcess(directory, spec.environment(), concurrency=2, hostname=f"{spec.base}-{uuid4().hex[:8]}@test")
    stack.callback(worker.stop)
    worker.start(wait=False)
    return SharedWorker(spec, app, worker, ledger, broker.queue, broker.other_queue("aside"))
