"""The steps of a process, and its death at one of them.

A step is whatever the main thread says to a database or a broker, once before and once after: a statement, a commit, a Redis command, an
AMQP method; and an acknowledgement. Greetings, which change nothing, are none. Steps are found by instrumentation, so that none is
forgotten: a test has a process killed at the first, another one at the second, and so on, until one comes to its end.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.forked import ForkedProcess
from tests.support.waiting import wait_until

__all__ = ["KILL_PLACES", "KillPoints", "Victim"]

#: Where processes are killed at every step, as ``(store_url, broker)``: `make test` has each store and each broker, and `make test-kills`
#: all pairs. Only one of them has quorum queues in `make test`, a queue for each step: RabbitMQ sets three of its file handles aside for
#: each such queue, and answers nobody who connects once it has none left.
KILL_PLACES = (
    [(store, broker) for store in ("sqlite", "postgresql", "mariadb") for broker in ("redis", "rabbitmq-quorum")]
    if os.environ.get("CELERY_IDEMPOTENT_TEST_KILLS") == "all"
    else [("sqlite", "rabbitmq-quorum"), ("postgresql", "redis"), ("mariadb", "redis")]
)

#: What the AMQP methods of a producer and a consumer are called.
_AMQP = {(60, 40): "publish", (60, 80): "ack", (60, 90): "reject"}

#: How a connection begins: nothing is changed by it, so who dies there leaves what it leaves before the command that follows. AMQP's classes 10
#: and 20 open and close connections and channels.
_GREETINGS = {"HELLO", "CLIENT", "PING", "AUTH", "SELECT"}
_OF_CONNECTIONS = {10, 20}

#: Takes the quotes from a statement of Django's.
_UNQUOTED = str.maketrans("", "", '`"')


class KillPoints:
    """Counts the steps of this process's main thread, and kills it at one of them.

    Args:
        last: The number of the step at which it dies, from 1.
        path: A file that is told which that was, or that it was never reached. All that were reached are in the file of this name with
            ``.reached`` after it.
    """

    def __init__(self, last: int, path: Path) -> None:
        self._last = last
        self._path = path
        self._reached: list[str] = []
        self._counting = False
        _instrument(self)

    def begin(self) -> None:
        """Count from here on."""
        self._counting = True

    def end(self) -> None:
        """End it, unreached."""
        if self._counting:
            self._counting = False
            self._note("survived")

    def __call__(self, what: str) -> None:
        """Reach a step."""
        if not self._counting or threading.current_thread() is not threading.main_thread():
            return
        self._reached.append(what)
        if len(self._reached) == self._last:
            self._note(what)
            os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, what: str) -> None:
        Path(f"{self._path}.reached").write_text("\n".join(" ".join(step.split()) for step in self._reached))
        with self._path.open("a") as file:
            file.write(f"{self._last} {what}\n")


def _redis_step(command: object) -> str | None:
    """Return a Redis command's step, by its name or that of the first of several; ``None`` if it is none."""
    found = re.search(r"\\r\\n([A-Za-z]+)", str(command))
    name = "command" if found is None else found[1].upper()
    return None if name in _GREETINGS else f"Redis {name}"


def _amqp_step(method: tuple[int, int]) -> str | None:
    """Return an AMQP method's step; ``None`` if it is none."""
    return None if method[0] in _OF_CONNECTIONS else f"AMQP {_AMQP.get(method, method)}"


def _instrument(step: KillPoints) -> None:
    import sqlalchemy as sa
    from amqp.abstract_channel import AbstractChannel
    from kombu.message import Message
    from redis.connection import AbstractConnection
    from sqlalchemy.engine.default import DefaultDialect

    @sa.event.listens_for(sa.Engine, "before_cursor_execute")
    def before(connection: object, cursor: object, statement: str, *_: object) -> None:
        step(f"before {statement[:60]}")

    @sa.event.listens_for(sa.Engine, "after_cursor_execute")
    def after(connection: object, cursor: object, statement: str, *_: object) -> None:
        step(f"after {statement[:60]}")

    def around(owner: Any, name: str, says: Callable[..., str | None]) -> None:
        plain = getattr(owner, name)

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            what = says(*args)
            if what is None:
                return plain(self, *args, **kwargs)
            step(f"before {what}")
            answer = plain(self, *args, **kwargs)
            step(f"after {what}")
            return answer

        setattr(owner, name, counted)

    if "DJANGO_SETTINGS_MODULE" in os.environ:
        from django.db.backends.base.base import BaseDatabaseWrapper
        from django.db.backends.utils import CursorWrapper

        around(CursorWrapper, "execute", lambda sql, *_: str(sql).translate(_UNQUOTED)[:60])
        around(BaseDatabaseWrapper, "commit", lambda *_: "COMMIT")
    around(DefaultDialect, "do_commit", lambda *_: "COMMIT")
    around(AbstractConnection, "send_packed_command", lambda command, *_: _redis_step(command))
    around(AbstractChannel, "send_method", lambda method, *_: _amqp_step(method))
    around(Message, "ack", lambda *_: "the acknowledgement")


class Victim:
    """A process that is to die at a step.

    Args:
        target: What it does; is given its steps, and has to begin them.
        arguments: For that.
        last: The number of the step.
        path: See :class:`Steps`.
        log: What it prints.
        environment: Over that of this process.
    """

    def __init__(
        self,
        target: Callable[..., None],
        *arguments: Any,
        last: int,
        path: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = log
        self._last, self._path = last, path
        self._start = partial(
            ForkedProcess,
            *(_run, target, arguments, last, path),
            log=log,
            directory=log.parent,
            environment={**os.environ, **(environment or {})},
        )

    def survives(self, *, timeout: float) -> bool:
        """Start it, wait until it has died or ended, and make sure that none of its processes is left."""
        process = self._start()
        try:
            wait_until(
                lambda: process.poll() is not None or self._survived(),
                timeout=timeout,
                describe=self._tail,
                interval=0.01,
            )
            survived = self._survived()
            assert survived or process.poll() == -signal.SIGKILL, self._tail()
            return survived
        finally:
            process.kill()

    def _survived(self) -> bool:
        return self._path.exists() and f"{self._last} survived" in self._path.read_text().splitlines()

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-40:]) if self._log.exists() else "no log"


def _run(target: Callable[..., None], arguments: Sequence[Any], last: int, path: Path) -> None:
    """Do what a victim does."""
    target(KillPoints(last, path), *arguments)


def work(steps: KillPoints, task: str, queue: str, hostname: str) -> None:
    """Be a worker in one process; its steps are those from when it has received a task to its acknowledgement."""
    from celery import signals
    from kombu.message import Message

    @signals.task_received.connect(weak=False)
    def begin(request: Any, **_: Any) -> None:
        if request.name == task:
            steps.begin()

    ack = Message.ack

    def last_step(self: Message, *args: Any, **kwargs: Any) -> None:
        ack(self, *args, **kwargs)
        steps.end()

    Message.ack = last_step
    sys.argv = [
        *("celery", "-A", "tests.support.apps.worker", "worker", "--pool=solo", f"--queues={queue}"),
        *(f"--hostname={hostname}", "--loglevel=INFO", "--without-gossip", "--without-mingle", "--without-heartbeat"),
    ]
    from celery.__main__ import main

    main()
