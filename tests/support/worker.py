"""A real Celery worker in its own processes, to be called, killed and replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

import psutil

from tests.support.apps.spec import AppSpec
from tests.support.forked import ForkedProcess, environment_is_as_at_first
from tests.support.processes import Process, kill_tree, process_tree, signal_all
from tests.support.waiting import TIMEOUT, wait_until

__all__ = ["Pool", "StartWorker", "WorkerProcess"]

Pool = Literal["prefork", "threads", "solo", "gevent", "eventlet"]

ROOT = Path(__file__).resolve().parents[2]


#: The app that an :class:`~tests.support.apps.spec.AppSpec` describes.
APP = "tests.support.apps.worker"


class WorkerProcess:
    """``celery -A APP worker``, started, watched and ended.

    It is started as a program, or forked with Celery imported, which spares a second of a processor: the app is the tests' own, and nothing
    else is in its environment that could change what is imported; nor does its pool patch what is imported.

    Args:
        directory: Where it runs and where its log goes.
        environment: Added to ours; :meth:`tests.support.apps.AppSpec.environment` makes one.
        app: Module of the app.
        pool: Celery's ``--pool``.
        concurrency: Celery's ``--concurrency``.
        queues: What it consumes from; by default the app's default queue.
        hostname: Its node name, ``name@host``; by default one that nobody else has.
        arguments: Any other arguments of ``celery worker``.
        patience: Seconds until it must be ready, and until it must be gone after a warm shutdown.

    Attributes:
        hostname: Its node name.
        pool: Celery's ``--pool``.
        log: The file that holds what it wrote to its standard output and error.
    """

    def __init__(
        self,
        directory: Path,
        environment: Mapping[str, str],
        *,
        app: str = APP,
        pool: Pool = "prefork",
        concurrency: int = 1,
        queues: Sequence[str] = (),
        hostname: str | None = None,
        arguments: Sequence[str] = (),
        patience: float = 60.0,
    ) -> None:
        self.pool = pool
        self.hostname = hostname or f"{pool}-{uuid4().hex[:8]}@test"
        self.log = directory / f"{self.hostname}.log"
        self.patience = patience
        self._directory = directory
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **environment,
        }
        self._is_forked = (
            app == APP
            and set(environment) == {AppSpec.VARIABLE}
            and environment_is_as_at_first()
            and pool in ("prefork", "threads", "solo")
        )
        self._command = [
            *("celery", "-A", app, "worker"),
            *(f"--pool={pool}", f"--concurrency={concurrency}", f"--hostname={self.hostname}", "--loglevel=INFO"),
            *([f"--queues={','.join(queues)}"] if queues else []),
            # What these do at the start takes seconds, and looks at other workers.
            *("--without-gossip", "--without-mingle"),
            *arguments,
        ]
        self._process: Process | None = None

    # -- starting ---------------------------------------------------------------------------------------------------------

    def start(self, *, wait: bool = True) -> WorkerProcess:
        """Start it; with ``wait``, return once it consumes.

        A worker that was ended may be started again, under the same node name; its log goes on.

        Raises:
            AssertionError: It ended, or was not ready in time; the text ends with its log.
        """
        assert self._process is None, f"{self.hostname} is running"
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            if self._is_forked:
                self._process = ForkedProcess(
                    *(run_celery, self._command),
                    log=self.log,
                    directory=self._directory,
                    environment=self._environment,
                )
            else:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", *self._command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self._directory,
                    env=self._environment,
                    start_new_session=True,
                )
        if wait:
            self.wait_until_ready()
        return self

    def wait_until_ready(self) -> None:
        """Wait until it consumes."""
        self.wait_for_log(f"{self.hostname} ready.", timeout=self.patience)

    def wait_for_log(self, text: str, *, timeout: float = TIMEOUT) -> None:
        """Wait until its log since the last start has a text."""

        def written() -> bool:
            if text in self._log_text():
                return True
            assert self.is_alive, f"{self.hostname} ended with status {self.exit_status}:\n{self.log_tail()}"
            return False

        wait_until(written, timeout=timeout, describe=lambda: f"{text!r} from {self.hostname}:\n{self.log_tail()}")

    # -- looking ----------------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The process id of the main process."""
        assert self._process is not None, f"{self.hostname} is not running"
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the main process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """The main process's exit status, negative for a signal; ``None`` while it runs."""
        return None if self._process is None else self._process.poll()

    def children(self) -> list[psutil.Process]:
        """Its child processes: the pool of ``prefork``."""
        return process_tree(self.pid)[1:]

    def log_tail(self, lines: int = 60) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    # -- ending -----------------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """``SIGKILL`` the main process and all its children, at once, and wait until they are gone."""
        if self._process is not None:
            kill_tree(self._process)
            self._process = None

    def kill_children(self) -> list[int]:
        """``SIGKILL`` the children and leave the main process to find out; answers the process ids."""
        children = self.children()
        assert children, f"{self.hostname} has no children"
        signal_all(children, signal.SIGKILL)
        return [child.pid for child in children]

    def signal(self, signum: signal.Signals) -> None:
        """Send the main process a signal, if it runs: ``SIGTERM`` is a warm shutdown, ``SIGQUIT`` a cold one."""
        if self.is_alive:
            os.kill(self.pid, signum)

    def pause(self) -> None:
        """``SIGSTOP`` all of it: it holds what it holds and renews nothing."""
        signal_all(process_tree(self.pid), signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after a pause."""
        signal_all(process_tree(self.pid), signal.SIGCONT)

    def terminate(self) -> int:
        """Shut it down warmly, wait until it has finished what it was doing, and answer its exit status.

        Raises:
            AssertionError: It was not gone in time; it is killed then.
        """
        assert self._process is not None, f"{self.hostname} is not running"
        self.signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout=self.patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.hostname} did not shut down:\n{self.log_tail()}") from None
        finally:
            self.kill()

    def stop(self) -> None:
        """Kill all of its processes, in any state."""
        self.kill()

    def _log_text(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")


def run_celery(command: list[str]) -> None:
    """Be ``python -m COMMAND``, whose first word is ``celery``, in a process that was forked for it."""
    sys.path[:0] = [os.getcwd(), *os.environ["PYTHONPATH"].split(os.pathsep)]  # noqa: PTH109 - a path as Python enters it
    sys.argv = command
    from celery.__main__ import main

    main()


class StartWorker(Protocol):
    """What the fixture ``start_worker`` gives; the options are those of :class:`WorkerProcess`."""

    def __call__(
        self,
        spec: AppSpec,
        *,
        pool: Pool = "prefork",
        concurrency: int = 1,
        wait: bool = True,
        **options: Any,
    ) -> WorkerProcess: ...
