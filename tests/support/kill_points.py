"""The steps of a process, and its death at one of them.

A step is whatever the main thread says to a database or a broker, once before and once after: a statement, a commit, a Redis command, an
AMQP method; and an acknowledgement. They are found by instrumentation, so that none is forgotten: a test has a process killed at the
first, another one at the second, and so on, until one comes to its end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_until

__all__ = ["KillPoints", "Victim"]

#: What the AMQP methods of a producer and a consumer are called.
_AMQP = {(60, 40): "publish", (60, 80): "ack", (60, 90): "reject"}

#: Takes the quotes from a statement of Django's.
_UNQUOTED = str.maketrans("", "", '`"')

#: Imported once, by the process that the victims are forked from: each needs some tens of milliseconds then, not seconds.
_PRELOADED = (
    *(
        "celery.bin.celery",
        "celery.bin.worker",
        "celery.apps.worker",
        "celery.concurrency.solo",
        "celery.backends.redis",
    ),
    *("celery.worker.consumer.consumer", "kombu.transport.redis", "kombu.transport.pyamqp", "redis", "amqp"),
    *("psycopg", "pymysql", "sqlite3", "sqlalchemy.orm", "sqlalchemy.dialects.postgresql.psycopg"),
    *("sqlalchemy.dialects.mysql.pymysql", "sqlalchemy.dialects.sqlite.pysqlite", "celery_idempotent.stores.sql"),
    *(
        "celery_idempotent.maintenance.recovery",
        "celery_idempotent.producer.publisher",
        "tests.support.apps.atomic",
        "tests.support.kill_points",
    ),
)

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(_PRELOADED))


class KillPoints:
    """Counts the steps of this process's main thread, and kills it at one of them.

    Args:
        last: The number of the step at which it dies, from 1.
        path: A file that is told which that was, or that it was never reached.
    """

    def __init__(self, last: int, path: Path) -> None:
        self._last = last
        self._path = path
        self._counted = 0
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
        self._counted += 1
        if self._counted == self._last:
            self._note(what)
            os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, what: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{self._last} {what}\n")


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

    def around(owner: Any, name: str, says: Callable[..., str]) -> None:
        plain = getattr(owner, name)

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            what = says(*args)
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
    around(AbstractConnection, "send_packed_command", lambda command, *_: f"Redis {str(command)[:60]}")
    around(AbstractChannel, "send_method", lambda method, *_: f"AMQP {_AMQP.get(method, method)}")
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
        self._process: BaseProcess = _CONTEXT.Process(
            target=_run, args=(target, arguments, last, path, log, dict(environment or {})), daemon=True
        )

    def survives(self, *, timeout: float) -> bool:
        """Start it, wait until it has died or ended, and make sure that none of its processes is left."""
        self._process.start()
        try:
            wait_until(lambda: self._ended() or self._survived(), timeout=timeout, describe=self._tail)
            survived = self._survived()
            assert survived or self._process.exitcode == -signal.SIGKILL, self._tail()
            return survived
        finally:
            self._process.kill()
            self._process.join()
            self._process.close()

    def _ended(self) -> bool:
        return not self._process.is_alive()

    def _survived(self) -> bool:
        return self._path.exists() and f"{self._last} survived" in self._path.read_text().splitlines()

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-40:]) if self._log.exists() else "no log"


def _run(
    target: Callable[..., None],
    arguments: Sequence[Any],
    last: int,
    path: Path,
    log: Path,
    environment: Mapping[str, str],
) -> None:
    """Do what a victim does."""
    os.environ.update(environment)
    os.chdir(log.parent)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
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
