"""What is measured: plain Celery, this library on each store, and other packages; each knows how to build its app.

The packages are set up as their own documentation has it for a task that is known by its arguments. What four of them need is
written down in :mod:`tests.chaos.variants`, where they are put through chaos.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from celery import Celery, Task

from celery_idempotent import IdempotentTask
from tests.chaos.variants import VARIANTS
from tests.support.worker import ROOT

__all__ = ["PEERS", "PLAIN", "STORES", "Place", "Subject", "subject_named"]

_WITHOUT_HIREDIS = Path(__file__).with_name("without_hiredis")


@dataclass(frozen=True, slots=True)
class Subject:
    """One way to run the tasks.

    Attributes:
        name: As on the command line and in the tables.
        kind: Plain Celery, this library on a store, or somebody else's package.
        module: What has to be importable for it.
        slow: Whether its worker takes about a second for each task, so that it is given few.
    """

    name: str
    kind: Literal["plain", "store", "peer"]
    module: str = "celery"
    slow: bool = False

    #: The module with the tasks, and what ``celery -A`` is given.
    tasks_module: ClassVar[str] = "benchmarks.app"
    worker_app: ClassVar[str] = "benchmarks.app"
    #: Arguments of ``celery worker``.
    worker_arguments: ClassVar[tuple[str, ...]] = ()
    #: Where messages wait; Celery's default queue, in a database of the subject's own.
    queue: ClassVar[str] = "celery"
    has_groups: ClassVar[bool] = True
    #: Whether a result that nobody wants is not stored.
    ignores_results: ClassVar[bool] = True

    def share(self, count: int) -> int:
        """How many of so many tasks its worker is given."""
        return max(count // 200, 10) if self.slow else count

    @property
    def has_transactions(self) -> bool:
        """Whether there are atomic tasks."""
        return self.guarded and self.name != "redis"

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that do nothing, or no more than return a result."""
        return ("noop", "echo") if self.kind == "peer" else ("noop", "echo", "keyless")

    def environment(self, redis: str) -> dict[str, str]:
        """Return what its processes need to find in their environment besides their place."""
        # On the path before what is installed.
        return {"PYTHONPATH": os.pathsep.join((str(ROOT), str(_WITHOUT_HIREDIS)))}

    @property
    def is_there(self) -> bool:
        """Whether it is installed in this environment."""
        return find_spec(self.module) is not None

    @property
    def guarded(self) -> bool:
        """Whether it is this library."""
        return self.kind == "store"

    def options(self, message_id: str | None) -> dict[str, Any]:
        """Return what a task is made with.

        Args:
            message_id: How this library is to know a message; ``None`` for the task id. The others know it by its arguments.
        """
        match self.kind:
            case "plain":
                return {"base": Task}
            case "store":
                return {"base": IdempotentTask, "message_id": message_id}
            case "peer":
                return VARIANTS[self.name].task_options


class Relier(Subject):
    """relier: an app of its own, with settings in the environment, and hiredis."""

    tasks_module = "benchmarks.relier_app"
    worker_app = "relier.tasks.app"
    worker_arguments = ("--include=benchmarks.relier_app",)
    queue = "default"
    # `task.s()` goes past its envelope.
    has_groups = False
    # It sends by name, which says to the worker that a result is wanted, whatever the task says.
    ignores_results = False

    def environment(self, redis: str) -> dict[str, str]:
        return {
            "PYTHONPATH": str(ROOT),
            "RELIER_REDIS_URL": redis,
            # Or it refuses whatever is beyond 500 messages per second, which is not what is measured here.
            "RELIER_ADMISSION_LIMIT": "1000000000",
            # As for all: what a worker logs at INFO is the most expensive part of a no-op.
            "RELIER_LOG_LEVEL": "WARNING",
            "RELIER_SECRET_KEY": "benchmark",
        }


PLAIN = Subject("plain", "plain")
STORES: Mapping[str, Subject] = {
    name: Subject(name, "store", module)
    for name, module in (
        ("postgresql", "psycopg"),
        ("mariadb", "pymysql"),
        ("sqlite", "sqlite3"),
        ("redis", "redis"),
    )
}
PEERS: Mapping[str, Subject] = {
    **{
        # celery-heimdall's worker waits in vain, for a second, for the lock that its producer has taken.
        name: Subject(name, "peer", name.replace("-", "_"), slow=name == "celery-heimdall")
        for name in ("celery-once", "celery-singleton", "celery-heimdall", "celery-once-task")
    },
    "relier": Relier("relier", "peer", "relier"),
}


def subject_named(name: str) -> Subject:
    """Return the subject of that name."""
    return {PLAIN.name: PLAIN, **STORES, **PEERS}[name]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a subject's processes find what they need; everything in it is JSON.

    Attributes:
        subject: The subject's name.
        redis: Broker and result backend, and the locks of those who take them there: a database of the subject's own.
        marks: Where tasks note that they ran, see :class:`benchmarks.marks.Marks`.
        store: URL of the queue log's store; ``None`` for all but this library.
    """

    subject: str
    redis: str
    marks: str
    store: str | None

    #: The environment variable by which a process knows its place.
    VARIABLE: ClassVar[str] = "CELERY_IDEMPOTENT_BENCHMARK"

    def environment(self) -> dict[str, str]:
        """Return what a process of the subject needs to find in its environment."""
        own = subject_named(self.subject).environment(self.redis)
        return {Place.VARIABLE: json.dumps(asdict(self)), **own}

    @classmethod
    def of_this_process(cls) -> Place:
        """Return the place that this process was started for."""
        return cls(**json.loads(os.environ[cls.VARIABLE]))

    def app(self) -> Celery:
        """Build the subject's app, without its tasks. Nothing is connected."""
        subject = subject_named(self.subject)
        app = Celery("benchmarks", broker=self.redis, backend=self.redis)
        app.conf.update(broker_connection_retry_on_startup=True)
        if self.store is not None:
            app.conf.update(idempotent_store=self.store)
        if subject.kind == "peer":
            variant = VARIANTS[subject.name]
            app.conf.update(variant.app_settings(self.redis))
            variant.prepare(app)
        return app
