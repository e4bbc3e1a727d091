"""Where a run of chaos takes place: private servers, workers that are replaced when they die, and a sender."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from tests.chaos.effects_db import EffectsDB
from tests.chaos.plan import LEASE, Plan
from tests.chaos.sender import Orders, Sent, journal
from tests.chaos.tasks import ASIDE, EFFECTS_DB, GEVENT
from tests.chaos.variants import Variant
from tests.support.apps import AppSpec, close_app
from tests.support.ledger import Ledger
from tests.support.processes import kill_tree, process_tree
from tests.support.servers import (
    PrivateMariaDB,
    PrivatePgBouncer,
    PrivatePostgreSQL,
    PrivateRabbitMQ,
    PrivateRedis,
    PrivateServer,
)
from tests.support.worker import ROOT, Pool, WorkerProcess

__all__ = ["BROKERS", "GEVENT_NAME", "QUEUE", "STORES", "WORKERS", "Done", "Environment", "open_environment"]


class _LogRedis(PrivateRedis):
    """A Redis that may be killed at any moment: what it has answered to is on its disk.

    With ``everysec`` it is not always so. While its fsync is under way, Redis answers and keeps what it was told in memory, for up to
    two seconds; what a kill takes then, no audit could tell from what the library loses.
    """

    def command(self) -> list[str]:
        return [*super().command(), "--appendfsync", "always"]


class _PooledPostgreSQL(PrivatePostgreSQL):
    """A PostgreSQL that everybody reaches through a PgBouncer in transaction pooling; a restart is one of both."""

    #: Connections to it, for some thirty clients.
    POOL_SIZE = 12

    def __init__(self) -> None:
        super().__init__()
        self._pooler: PrivatePgBouncer | None = None

    @property
    def url(self) -> str:
        return super().url if self._pooler is None else self._pooler.url

    @property
    def direct_url(self) -> str:
        return super().url

    def furnish(self) -> None:
        super().furnish()
        self._pooler = PrivatePgBouncer(super().url, pool_size=self.POOL_SIZE)
        self._pooler.start()

    def restart(self) -> None:
        pooler, self._pooler = self._pooler, None
        assert pooler is not None
        pooler.stop()
        super().restart()
        pooler.start()
        self._pooler = pooler

    def close(self) -> None:
        if self._pooler is not None:
            self._pooler.close()
        super().close()


STORES: dict[str, type[PrivateServer]] = {
    "postgresql": PrivatePostgreSQL,
    "pgbouncer": _PooledPostgreSQL,
    "mariadb": PrivateMariaDB,
    "redis": _LogRedis,
    "django-postgresql": PrivatePostgreSQL,
    "django-mariadb": PrivateMariaDB,
}

#: How the names of those places begin where workers and senders are processes of a Django project, whose queue log is ``django://default``.
DJANGO = "django-"

BROKERS: dict[str, type[PrivateServer]] = {"redis": PrivateRedis, "rabbitmq": PrivateRabbitMQ}

#: Workers, and processes of each.
WORKERS, CONCURRENCY = 4, 2

#: Greenlets of the one worker with a gevent pool, and how its node name begins.
GREENLETS, GEVENT_NAME = 8, "g"

#: Seconds. Less than the bodies that outlive their lease take, and than the longest countdown.
VISIBILITY_TIMEOUT = LEASE

QUEUE = "chaos"


@dataclass(frozen=True, slots=True)
class Done:
    """A fault, as it came about.

    Attributes:
        kind: What was done.
        at, until: From when to when, seconds since the epoch.
        pids: The processes that it killed or paused, and when each was gone, or went on.
        count: How many connections were cut, or copies put on the broker.
        keys: The steps that were revoked.
    """

    kind: str
    at: float
    until: float
    pids: Mapping[int, float] = field(default_factory=dict)
    count: int = 0
    keys: tuple[str, ...] = ()


class Environment:
    """Servers, workers and a sender.

    Attributes:
        spec: What the workers' and the sender's app is made of.
        app: The same app, in this process.
        store, broker, backend: The servers. The backend is left alone.
        transactions: Whether the store has any that are its users' too.
        effects_db: What they wrote.
        workers: Those that are to run.
        gave_up: Workers that have ended by themselves, and were replaced.
        directory: Logs and journals.
    """

    def __init__(
        self,
        directory: Path,
        variant: Variant,
        store: PrivateServer,
        broker: PrivateServer,
        backend: PrivateServer,
        *,
        django: bool = False,
    ) -> None:
        self.directory, self.variant = directory, variant
        self.store, self.broker, self.backend = store, broker, backend
        on_redis = isinstance(broker, PrivateRedis)
        self.transactions = not isinstance(store, PrivateRedis)
        # Nothing writes here, so they stay empty.
        effects_db = store.url if self.transactions else f"sqlite:///{directory / 'effects'}"
        guarded = {
            "idempotent_lease": LEASE,
            "idempotent_recovery_interval": 0.5,
            "idempotent_lost_after": 5.0,
        }
        self.spec = AppSpec(
            broker=broker.url,
            backend=backend.url,
            store=store.url,
            queue=QUEUE,
            ledger=str(directory / "ledger"),
            base="idempotent" if variant.guarded else "plain",
            tasks=("tests.chaos.tasks",),
            orm="tests.chaos.orm" if django else None,
            transport_options={
                "visibility_timeout": VISIBILITY_TIMEOUT,
                "unacked_restore_interval": 1,
                "unacked_restore_throttle": 1,
                # A worker that is killed while it looks for expired deliveries keeps all others from that for so long.
                "unacked_mutex_expire": 5,
            }
            if on_redis
            else {},
            settings={
                **(guarded if variant.guarded else {}),
                **variant.app_settings(backend.url),
                EFFECTS_DB: effects_db,
                "broker_connection_max_retries": None,
                "broker_connection_timeout": 2,
                # As for any app with long tasks: what is reserved by a worker that is busy waits although others are idle.
                "worker_prefetch_multiplier": 1,
                **({} if on_redis else {"task_default_queue_type": "quorum", "task_default_exchange_type": "topic"}),
            },
        )
        self.ledger = Ledger(self.spec.ledger)
        self.effects_db = EffectsDB(effects_db)
        self.app: Celery = self.spec.build()
        self.app.finalize()
        self.workers: list[WorkerProcess] = []
        self.retired: list[WorkerProcess] = []
        self.orders: Orders | None = None
        self._sender: subprocess.Popen[bytes] | None = None
        self._names = itertools.count(1)
        self.gave_up = 0
        self._sent, self._read = 0, 0

    # -- workers ----------------------------------------------------------------------------------------------------------

    def hire(self, pool: Pool = "prefork") -> WorkerProcess:
        """Start another worker, and do not wait for it."""
        green = pool == "gevent"
        worker = WorkerProcess(
            self.directory,
            {**self.spec.environment(), Variant.VARIABLE: self.variant.name},
            pool=pool,
            concurrency=GREENLETS if green else CONCURRENCY,
            queues=[GEVENT] if green else [QUEUE, ASIDE],
            hostname=f"{GEVENT_NAME if green else 'w'}{next(self._names)}@chaos",
        )
        self.workers.append(worker.start(wait=False))
        return worker

    def replace(self, worker: WorkerProcess) -> None:
        """Start another for one that is gone, or is about to go."""
        self.workers.remove(worker)
        self.retired.append(worker)
        self.hire(worker.pool)

    def supervise(self) -> None:
        """Replace the workers that have ended by themselves, as a supervisor does in production.

        kombu 5.7 does not survive a Redis that is gone while a message is unacknowledged.
        """
        ended = [worker for worker in self.workers if not worker.is_alive]
        for worker in ended:
            self.replace(worker)
        self.gave_up += len(ended)

    def ready(self) -> list[WorkerProcess]:
        """Return the workers that have started, with their children."""
        return [worker for worker in self.workers if worker.is_alive and len(worker.children()) >= CONCURRENCY]

    def green(self) -> WorkerProcess:
        """Return the worker with a gevent pool."""
        return next(worker for worker in self.workers if worker.pool == "gevent")

    # -- the sender -------------------------------------------------------------------------------------------------------

    def start_sender(self, plan: Plan, *, tasks: int, kills: int) -> None:
        """Start the sender; it waits until it may send."""
        self.orders = Orders(plan.seed, tasks, kills, self.transactions, str(self.directory))
        self.allow(0)
        self.resume_sending()

    def allow(self, sendings: int) -> None:
        """Let the sender send so many in all."""
        assert self.orders is not None
        fresh = self.orders.limit.with_suffix(".fresh")
        fresh.write_text(str(sendings))
        fresh.replace(self.orders.limit)

    def resume_sending(self) -> None:
        """Start a sender that goes on where the last one was killed."""
        assert self.orders is not None
        with (self.directory / "sender.log").open("ab") as log:
            self._sender = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.sender"],
                cwd=ROOT,
                env={
                    **os.environ,
                    **self.spec.environment(),
                    **self.orders.environment(),
                    Variant.VARIABLE: self.variant.name,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def sent(self) -> list[Sent]:
        """Return what the senders have sent, by their journal."""
        assert self.orders is not None
        return journal(self.orders.journal)

    def count_sent(self) -> int:
        """How much that is, at little cost."""
        assert self.orders is not None
        with suppress(FileNotFoundError), self.orders.journal.open("rb") as notes:
            notes.seek(self._read)
            fresh = notes.read()
            self._read += len(fresh)
            self._sent += fresh.count(b"]\n")
        return self._sent

    def kill_sender(self) -> bool:
        """``SIGKILL`` the sender, if it is there; whether it was."""
        sender, self._sender = self._sender, None
        if sender is None or sender.poll() is not None:
            return False
        kill_tree(sender)
        return True

    @property
    def sender_status(self) -> int | None:
        """The sender's exit status; ``None`` while it sends."""
        return None if self._sender is None else self._sender.poll()

    # -- the end ----------------------------------------------------------------------------------------------------------

    def logs(self) -> Iterator[str]:
        """Yield what the workers and the senders wrote, each's whole."""
        for log in (*(worker.log for worker in (*self.retired, *self.workers)), self.directory / "sender.log"):
            if log.exists():
                yield log.read_text(errors="replace")

    def dump_stacks(self) -> None:
        """Write down what each process of the workers is doing, where py-spy is installed."""
        program = Path(sys.executable).with_name("py-spy")
        if not program.exists():
            return
        with (self.directory / "stacks").open("ab") as stacks:
            for worker in self.workers:
                for process in process_tree(worker.pid) if worker.is_alive else ():
                    subprocess.run(
                        [program, "dump", "--pid", str(process.pid)],
                        stdin=subprocess.DEVNULL,
                        stdout=stacks,
                        stderr=stacks,
                        check=False,
                        timeout=30,
                    )

    def dump_broker(self) -> None:
        """Write down what a Redis has that was delivered and not acknowledged, and whether a dead worker keeps others from it."""
        if not isinstance(self.broker, PrivateRedis):
            return
        with redis.Redis.from_url(self.broker.url) as client:
            held = {tag.decode(): message.decode() for tag, message in client.hgetall("unacked").items()}
            found = {"mutex ends in": client.ttl("unacked_mutex"), "waiting": client.llen(QUEUE), "unacked": held}
            (self.directory / "broker").write_text(json.dumps(found, indent=2))

    def close(self) -> None:
        """End everything that still runs."""
        self.kill_sender()
        for worker in (*self.workers, *self.retired):
            worker.stop()
        with suppress(Exception):
            close_app(self.app)


@contextmanager
def open_environment(directory: Path, *, variant: Variant, store: str, broker: str) -> Iterator[Environment]:
    """Start the servers and make the table; everything is ended, and the servers' data removed, on the way out.

    Raises:
        NotInstalledError: A server's programs are not on this machine.
    """
    with ExitStack() as stack:
        opened: list[Any] = [stack.enter_context(make()) for make in (STORES[store], BROKERS[broker], PrivateRedis)]
        environment = Environment(directory, variant, *opened, django=store.startswith(DJANGO))
        stack.callback(environment.close)
        if variant.guarded:
            environment.app.queue_log.init()
        environment.effects_db.create()
        for _ in range(WORKERS):
            environment.hire()
        environment.hire("gevent")
        for worker in environment.workers:
            worker.wait_until_ready()
        yield environment
