"""A private server: on a free port, with its own data directory, removed when it is closed."""

from __future__ import annotations

import fcntl
import functools
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, Self

from tests.support.processes import kill_tree, process_tree, signal_all
from tests.support.servers.reach import why_unreachable
from tests.support.waiting import wait_until

__all__ = ["NotInstalledError", "PrivateServer", "free_port"]


class NotInstalledError(RuntimeError):
    """The server's programs are not on this machine."""


class PrivateServer(ABC):
    """A server that a test may do anything to.

    Use as a context manager: entering starts it, leaving kills it and removes its data. The port and the data stay the same
    over ``stop``/``kill`` and ``start``, so clients find it again.

    Attributes:
        port: Its TCP port on 127.0.0.1, free when it was chosen.
        directory: Data and log.
    """

    #: The server's name.
    name: ClassVar[str]
    #: The account it runs under when we are root; some servers refuse to run as root.
    account: ClassVar[str]
    #: What ends it in good order.
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    #: Seconds until it must answer after a start.
    patience: ClassVar[float] = 30.0

    def __init__(self) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.name}-{self.port}-"))
        self._user = _account(self.account)
        if self._user is not None:
            shutil.chown(self.directory, self._user)
        self._process: subprocess.Popen[bytes] | None = None
        self._prepared = False

    # -- what each kind of server says of itself -------------------------------------------------------------------------

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients find it."""

    @abstractmethod
    def command(self) -> list[str]:
        """Return what runs it in the foreground. Raises :class:`NotInstalledError`."""

    def environment(self) -> Mapping[str, str]:
        """Return what it needs to find in its environment."""
        return {}

    def prepare(self) -> None:  # noqa: B027 - some have nothing to prepare
        """Make its data directory; called once, before the first start."""

    def furnish(self) -> None:  # noqa: B027 - as above
        """Make what clients expect to find in it; called once, after the first start."""

    # -- what one does with it --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            NotInstalledError: Its programs are not here.
            AssertionError: It did not answer in time; the text ends with its log.
        """
        assert self._process is None, f"{self.name} is running"
        command = self.command()
        if not self._prepared:
            self.prepare()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env=self._environment(),
                start_new_session=True,
                **self._as_account(),
            )
        # Whoever asks before `furnish` asks for the server, not for what will be in it.
        self._wait_until_it_answers(self.url if self._prepared else self.empty_url)
        if not self._prepared:
            self.furnish()
            self._prepared = True

    @property
    def empty_url(self) -> str:
        """Where it answers before it was furnished."""
        return self.url

    @property
    def pid(self) -> int:
        """The process id of its main process."""
        assert self._process is not None, f"{self.name} is not running"
        return self._process.pid

    @property
    def log(self) -> Path:
        """What it wrote to its standard output and error."""
        return self.directory / "log"

    def log_tail(self, lines: int = 20) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def stop(self) -> None:
        """Shut it down in good order and wait until it is gone."""
        if self._process is None:
            return
        self.resume()
        self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(timeout=self.patience)
        finally:
            self.kill()

    def kill(self) -> None:
        """``SIGKILL`` all of it, as when its machine loses power (less what the disk loses then)."""
        if self._process is not None:
            kill_tree(self._process)
            self._process = None

    def restart(self) -> None:
        """Stop in good order, start."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """``SIGSTOP`` all of it: connections stay open and nothing answers, as when a network swallows packets."""
        signal_all(process_tree(self.pid), signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after a pause."""
        signal_all(process_tree(self.pid), signal.SIGCONT)

    def close(self) -> None:
        """Kill it and remove its data."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- in private -------------------------------------------------------------------------------------------------------

    def run(self, *command: str) -> None:
        """Run one of the server's tools under its account, and fail with what it said."""
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.directory,
            env=self._environment(),
            check=False,
            timeout=120,
            **self._as_account(),
        )
        assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout.decode(errors='replace')}"

    def _environment(self) -> dict[str, str]:
        # A home of its own: nothing of the person who runs the tests has a say.
        return {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": str(self.directory), **self.environment()}

    def _as_account(self) -> dict[str, Any]:
        return {} if self._user is None else {"user": self._user, "group": self._user, "extra_groups": []}

    def _wait_until_it_answers(self, url: str) -> None:
        def answers() -> bool:
            assert self._process is not None
            status = self._process.poll()
            assert status is None, f"{self.name} ended with status {status}:\n{self.log_tail()}"
            return why_unreachable(url) is None

        wait_until(
            answers,
            timeout=self.patience,
            describe=lambda: f"{self.name} at {url}: {why_unreachable(url)}\n{self.log_tail()}",
        )


def _account(name: str) -> str | None:
    """Return the account to run under: ``None`` (our own) unless we are root."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(name)
    except KeyError:
        return "nobody"
    return name


#: The last ports that this process handed out. Each is reserved by a lock on a byte of a file, which others of this machine's
#: runs respect; the lock goes with the process.
_reserved: deque[int] = deque(maxlen=64)


def free_port() -> int:
    """Return a free port, outside the range of outgoing connections, which nobody else is given for now."""
    while True:
        port = random.randint(20_000, 32_000)
        try:
            if len(_reserved) == _reserved.maxlen:
                fcntl.lockf(_reservations(), fcntl.LOCK_UN, 1, _reserved.popleft())
            fcntl.lockf(_reservations(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        if port not in _reserved:
            _reserved.append(port)
            return port


@functools.cache
def _reservations() -> IO[bytes]:
    return Path(tempfile.gettempdir(), f"celery-idempotent-ports-{os.geteuid()}").open("wb")
