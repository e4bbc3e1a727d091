"""The faults: each is done to a site at once, and noted."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import amqp
import psutil
import redis
import sqlalchemy as sa
from kombu import Connection
from kombu.exceptions import OperationalError

from tests.chaos.environment import QUEUE, WORKERS, Done, Environment
from tests.chaos.plan import LEASE, Fault
from tests.support.ledger import Entry
from tests.support.processes import process_tree, signal_all
from tests.support.servers import PrivateMariaDB, PrivateRabbitMQ, PrivateRedis, PrivateServer
from tests.support.worker import WorkerProcess

__all__ = ["Faults"]

#: Seconds for which a server or a worker is paused at most: the claims of the living must outlive it. They were renewed a third of
#: their lease ago at worst.
SHORT_PAUSE = LEASE / 3

#: Debian's program of this name in /usr/sbin insists on an account; the one that it calls does not.
RABBITMQCTL = "/usr/lib/rabbitmq/bin/rabbitmqctl"

#: Seconds after which a cold shutdown is made colder, as a service manager does it.
STOP_WITHIN = 10.0

#: Copies that are put on the broker in one go, at most.
COPIES = 5


#: Seconds that are waited for a message to run that may be revoked.
REVOCABLE_WITHIN = 20.0


@dataclass(slots=True)
class _Note:
    count: int = 0
    keys: tuple[str, ...] = ()
    pids: dict[int, float] = field(default_factory=dict)


class Faults:
    """Does faults to a site.

    Args:
        site: The site.
        seed: For the choices that a fault's own does not cover.

    Attributes:
        done: What was done so far.
    """

    def __init__(self, environment: Environment, seed: int) -> None:
        self.environment = environment
        self.done: list[Done] = []
        self._rng = random.Random(seed)
        self._deeds: dict[str, Callable[[float], None]] = {
            "kill a child": lambda choice: self._end_child(choice, signal.SIGKILL, "kill a child"),
            "terminate a child": lambda choice: self._end_child(choice, signal.SIGTERM, "terminate a child"),
            "kill a worker": self._kill_worker,
            "kill a main process": self._kill_main,
            "kill the sender": self._kill_sender,
            "shut down a worker": lambda choice: self._shut_down(choice, signal.SIGTERM, "shut down a worker"),
            "shut down a worker cold": lambda choice: self._shut_down(
                choice, signal.SIGQUIT, "shut down a worker cold"
            ),
            "pause a worker": lambda choice: self._pause_worker(choice, choice * SHORT_PAUSE, "pause a worker"),
            "pause a worker past its lease": lambda choice: self._pause_worker(
                choice, LEASE * (1.3 + choice / 2), "pause a worker past its lease"
            ),
            "cut the store's connections": lambda _: self._cut_store(),
            "restart the store": lambda _: self._restart(environment.store, "restart the store"),
            "kill the store": lambda _: self._kill_server(environment.store, "kill the store"),
            "pause the store": lambda choice: self._pause_server(environment.store, choice, "pause the store"),
            "cut the broker's connections": lambda _: self._cut_broker(),
            "restart the broker": lambda _: self._restart(environment.broker, "restart the broker"),
            "kill the broker": lambda _: self._kill_server(environment.broker, "kill the broker"),
            "pause the broker": lambda choice: self._pause_server(environment.broker, choice, "pause the broker"),
            "put copies on the broker": self._put_copies,
            "kill a gevent worker": lambda _: self._kill_gevent_worker(),
            "terminate a message": self._terminate_message,
            "revoke messages": lambda _: self._revoke_messages(),
        }

    def do(self, fault: Fault) -> None:
        """Do one; it is over, or what follows from it has begun, when this returns."""
        self._deeds[fault.kind](fault.choice)

    # -- workers ----------------------------------------------------------------------------------------------------------

    def _worker(self, choice: float) -> WorkerProcess:
        """One of those that are up; all but one have to be, or it would show how long workers take to start."""
        deadline = time.monotonic() + 60
        while len(ready := self.environment.ready()) < WORKERS - 1:
            assert time.monotonic() < deadline, "too few workers are ready: " + "\n".join(
                worker.log_tail(20) for worker in self.environment.workers
            )
            self.environment.supervise()
            time.sleep(0.05)
        return ready[int(choice * len(ready))]

    def _end_child(self, choice: float, signum: signal.Signals, kind: str) -> None:
        children = self._worker(choice).children()
        child = children[int(choice * 1000) % len(children)]
        with self._noting(kind, [child]):
            signal_all([child], signum)

    def _kill_worker(self, choice: float) -> None:
        worker = self._worker(choice)
        with self._noting("kill a worker", process_tree(worker.pid)):
            worker.kill()
        self.environment.replace(worker)

    def _kill_main(self, choice: float) -> None:
        # Its children die with it: billiard asks the kernel for that.
        worker = self._worker(choice)
        with self._noting("kill a main process", process_tree(worker.pid)):
            os.kill(worker.pid, signal.SIGKILL)
        self.environment.replace(worker)

    def _kill_sender(self, _: float) -> None:
        with self._noting("kill the sender") as note:
            note.count = int(self.environment.kill_sender())
        self.environment.resume_sending()

    def _shut_down(self, choice: float, signum: signal.Signals, kind: str) -> None:
        worker = self._worker(choice)
        # Warm, it runs what it has begun to its end; cold, its children die with their bodies.
        dying = process_tree(worker.pid) if signum == signal.SIGQUIT else []
        with self._noting(kind, dying):
            worker.signal(signum)
            if psutil.wait_procs(dying, timeout=STOP_WITHIN)[1]:
                # Celery cancels its consumer in the signal's handler, even in the middle of using that connection.
                worker.kill()
        self.environment.replace(worker)

    def _pause_worker(self, choice: float, seconds: float, kind: str) -> None:
        worker = self._worker(choice)
        with self._noting(kind, process_tree(worker.pid), deadly=False):
            worker.pause()
            time.sleep(seconds)
            worker.resume()

    def _kill_gevent_worker(self) -> None:
        worker = self.environment.green()
        with self._noting("kill a gevent worker", process_tree(worker.pid)):
            worker.kill()
        self.environment.replace(worker)

    # -- messages that run ------------------------------------------------------------------------------------------------

    def _running(self) -> list[Entry]:
        """Return the bodies that run now and whose message may be revoked."""
        entries = self.environment.ledger.entries(task="revocable")
        ended = {(entry.detail, entry.pid) for entry in entries if entry.event != "start"}
        alive = set(psutil.pids())
        starts = (entry for entry in entries if entry.event == "start")
        return [entry for entry in starts if (entry.detail, entry.pid) not in ended and entry.pid in alive]

    def _wait_for_running(self) -> list[Entry]:
        deadline = time.monotonic() + REVOCABLE_WITHIN
        while not (running := self._running()) and time.monotonic() < deadline:
            self.environment.supervise()
            time.sleep(0.02)
        return running

    def _revoke_messages(self) -> None:
        """Revoke all that run, which is to let them end: what is killed before that may not run again."""
        running = self._wait_for_running()
        with self._noting("revoke messages") as note, suppress(OperationalError):
            note.keys = tuple(str(entry.detail) for entry in running)
            self.environment.app.control.revoke([entry.task_id for entry in running])
            note.count = len(running)

    def _terminate_message(self, choice: float) -> None:
        """Revoke one that runs, and have its worker kill the process that runs it, if it still does when the word comes."""
        running = self._wait_for_running()
        chosen = running[int(choice * len(running)) : int(choice * len(running)) + 1]
        processes = [process for entry in chosen for process in _process(entry.pid)]
        with self._noting("terminate a message") as note:
            for entry in chosen:
                note.keys = (str(entry.detail),)
                with suppress(OperationalError):
                    self.environment.app.control.revoke(entry.task_id, terminate=True, signal="SIGKILL")
            gone, _ = psutil.wait_procs(processes, timeout=2)
            note.pids = {process.pid: time.time() for process in gone}

    # -- notes ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _noting(self, kind: str, processes: Sequence[psutil.Process] = (), *, deadly: bool = True) -> Iterator[_Note]:
        """Note what the block does; of processes, also when each was gone."""
        note, at, gone = _Note(), time.time(), dict[int, float]()
        yield note
        if deadly:
            _, alive = psutil.wait_procs(
                processes, timeout=60, callback=lambda process: gone.setdefault(process.pid, time.time())
            )
            assert not alive, f"{kind}: {alive} did not die, by these main processes:\n{self._where_they_stand()}"
        until = time.time()
        pids = {**(gone if deadly else {process.pid: until for process in processes}), **note.pids}
        self.done.append(Done(kind, at, until, pids, note.count, note.keys))
        with (self.environment.directory / "faults").open("a") as notes:
            notes.write(json.dumps(asdict(self.done[-1])) + "\n")

    def _where_they_stand(self) -> str:
        """Return the stacks of all threads of the workers' main processes, which Celery logs for this signal, and what they logged before."""
        workers = [worker for worker in self.environment.workers if worker.is_alive]
        for worker in workers:
            worker.signal(signal.SIGUSR1)
        time.sleep(3)
        return "\n".join(f"{worker.hostname}, {worker.pid}:\n{worker.log_tail(200)}" for worker in workers)

    # -- servers ----------------------------------------------------------------------------------------------------------

    def _restart(self, server: PrivateServer, kind: str) -> None:
        with self._noting(kind):
            server.restart()

    def _kill_server(self, server: PrivateServer, kind: str) -> None:
        with self._noting(kind):
            server.kill()
            server.start()

    def _pause_server(self, server: PrivateServer, choice: float, kind: str) -> None:
        with self._noting(kind):
            server.pause()
            time.sleep(choice * SHORT_PAUSE)
            server.resume()

    def _cut_store(self) -> None:
        with self._noting("cut the store's connections") as note:
            store = self.environment.store
            note.count = _cut_redis(store) if isinstance(store, PrivateRedis) else self._cut_database()

    def _cut_database(self) -> int:
        count = 0
        with self._administering() as connection:
            if isinstance(self.environment.store, PrivateMariaDB):
                ids = connection.execute(
                    sa.text("SELECT id FROM information_schema.processlist WHERE id <> connection_id() AND db = 'test'")
                ).scalars()
                for number in list(ids):
                    with suppress(sa.exc.DBAPIError):  # it has gone by itself
                        connection.execute(sa.text(f"KILL {number}"))
                        count += 1
            else:
                count = len(
                    connection.execute(
                        sa.text(
                            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                            "WHERE datname = 'test' AND pid <> pg_backend_pid()"
                        )
                    ).all()
                )
        return count

    @contextmanager
    def _administering(self) -> Iterator[sa.Connection]:
        # Past a pooler.
        url = getattr(self.environment.store, "direct_url", self.environment.store.url)
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            yield connection

    def _cut_broker(self) -> None:
        with self._noting("cut the broker's connections") as note:
            broker = self.environment.broker
            if isinstance(broker, PrivateRabbitMQ):
                broker.run(RABBITMQCTL, "--quiet", "close_all_connections", "chaos")
            else:
                note.count = _cut_redis(broker)

    # -- copies -----------------------------------------------------------------------------------------------------------

    def _put_copies(self, choice: float) -> None:
        wanted = 1 + int(choice * COPIES)
        with self._noting("put copies on the broker") as note:
            if isinstance(self.environment.broker, PrivateRabbitMQ):
                note.count = _copy_on_rabbitmq(self.environment.broker.url, wanted)
            else:
                note.count = self._copy_on_redis(wanted)

    def _copy_on_redis(self, wanted: int) -> int:
        """Copy messages that wait and messages that run, byte by byte: the delivery tags are the same."""
        with redis.Redis.from_url(self.environment.broker.url) as client:
            waiting: list[Any] = client.lrange(QUEUE, 0, -1)
            running = [json.dumps(json.loads(held)[0]).encode() for held in client.hvals("unacked")]
            found = self._rng.sample(waiting + running, min(wanted, len(waiting + running)))
            for message in found:
                client.lpush(QUEUE, message)
            return len(found)


def _process(pid: int) -> list[psutil.Process]:
    """Return the process, if it is there."""
    with suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid)]
    return []


def _cut_redis(server: PrivateServer) -> int:
    with redis.Redis.from_url(server.url) as client:
        return sum(int(client.client_kill_filter(_type=kind)) for kind in ("normal", "pubsub"))


def _copy_on_rabbitmq(url: str, wanted: int) -> int:
    """Copy messages that wait; those that run are delivered again when their connection is cut."""
    copies = 0
    with Connection(url, transport_options={"confirm_publish": True}) as connection:
        channel = connection.default_channel
        taken = [message for _ in range(wanted) if (message := channel.basic_get(QUEUE)) is not None]
        for message in taken:
            channel.basic_publish(amqp.Message(message.body, **message.properties), exchange="", routing_key=QUEUE)
            copies += 1
        for message in taken:
            channel.basic_reject(message.delivery_tag, requeue=True)
    return copies
