"""Processes that have imported everything when they begin, because they are forked from one that has done that once.

A program that imports Celery, SQLAlchemy and this library needs a second of a processor for that alone, and tests start hundreds. The process
that is forked has nothing but imports: no threads, no connections and no app.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

__all__ = ["ForkedProcess", "environment_is_as_at_first"]

#: What workers and producers of the tests import. One that is missing costs its time in each process, and nothing else.
_PRELOADED = (
    *("celery.bin.celery", "celery.bin.worker", "celery.apps.worker", "celery.app.events", "celery.events.dispatcher"),
    *("celery.app.control", "celery.app.log", "celery.fixups.django", "kombu.pidbox", "billiard.popen_fork"),
    *("billiard.sharedctypes", "billiard.synchronize", "celery_idempotent.worker.request", "tests.support.worker"),
    *("celery.concurrency.prefork", "celery.concurrency.solo", "celery.concurrency.thread", "celery.app.trace"),
    *("celery.backends.redis", "celery.worker.autoscale", "celery.worker.components", "celery.worker.control"),
    *("celery.worker.consumer.consumer", "celery.worker.consumer.delayed_delivery", "celery.worker.strategy"),
    *("kombu.transport.filesystem", "kombu.transport.pyamqp", "kombu.transport.redis", "amqp", "redis"),
    *("psycopg", "pymysql", "sqlite3", "sqlalchemy.orm", "sqlalchemy.dialects.postgresql.psycopg"),
    *("sqlalchemy.dialects.mysql.pymysql", "sqlalchemy.dialects.sqlite.pysqlite", "celery_idempotent.stores.sql"),
    *("celery_idempotent.cli", "celery_idempotent.maintenance.recovery", "celery_idempotent.producer.publisher"),
    *("celery_idempotent.worker.bootsteps", "celery_idempotent.worker.control", "celery_idempotent.worker.events"),
    *("tests.support.apps.atomic", "tests.support.apps.generic", "tests.support.apps.outcomes"),
    "tests.support.apps.scenarios",
    "tests.support.kill_points",
)


def _environment() -> dict[str, str]:
    # Nothing is imported otherwise because of these.
    return {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "PYTEST_"))}


#: The environment in which everything is imported.
_AT_FIRST = _environment()

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(_PRELOADED))


def environment_is_as_at_first() -> bool:
    """Return whether a program would import the same now: prometheus_client, for one, looks into the environment as it is imported."""
    return _environment() == _AT_FIRST


class ForkedProcess:
    """A process in a session of its own, with what tests use of :class:`subprocess.Popen`. It has started.

    Args:
        target: What it does: a function of a module.
        arguments: For that.
        log: What it writes to its standard output and error is added to this file.
        directory: Where it runs.
        environment: All of its environment. What Python itself reads of it at its start has no effect.
    """

    def __init__(
        self,
        target: Callable[..., object],
        *arguments: Any,
        log: Path,
        directory: Path,
        environment: Mapping[str, str],
    ) -> None:
        self._process: ForkServerProcess = _CONTEXT.Process(
            target=_run, args=(target, arguments, log, directory, dict(environment)), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return its exit status, negative for a signal; ``None`` while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, and return its exit status.

        Raises:
            subprocess.TimeoutExpired: It runs on.
        """
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return status

    def kill(self) -> None:
        """``SIGKILL`` it, if it runs, and wait until it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self.wait()


def _run(
    target: Callable[..., object],
    arguments: tuple[Any, ...],
    log: Path,
    directory: Path,
    environment: Mapping[str, str],
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    target(*arguments)
