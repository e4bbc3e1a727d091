"""Real processes, each in a group of its own, that are always stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self


class DemoError(Exception):
    """The demo could not be carried through."""


def wait_until(condition: Callable[[], bool], *, seconds: float, every: float = 0.1) -> bool:
    """Wait for a condition; whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


class Process:
    """A Python module that runs in a process group of its own and writes to a log file.

    As a context manager it is gone at the end, come what may.
    """

    def __init__(self, *arguments: str, environ: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._gone = False
        with log.open("ab") as output:
            # A group of its own: Ctrl-C reaches the demo alone, and the demo stops the rest in order.
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env={**os.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def failed(self) -> bool:
        return self._process.poll() not in (None, 0)

    @property
    def killed(self) -> bool:
        return self._process.poll() == -signal.SIGKILL

    @property
    def last_words(self) -> str:
        """How its log ends."""
        lines = self.log.read_text().splitlines() or ["(nothing)"]
        return f"{self.log} ends with: {lines[-1]}"

    def wait_for(self, words: str, *, seconds: float) -> None:
        """Wait for words in the log.

        Raises:
            DemoError: They did not come in time, or the process ended without them.
        """
        wait_until(lambda: words in self.log.read_text() or self.ended, seconds=seconds)
        if words not in self.log.read_text():
            raise DemoError(f"no {words!r} within {seconds:.0f} s; {self.last_words}")

    def ask_to_stop(self) -> None:
        """Ask the process to finish what it is at, and to end; do not wait for it."""
        if not self.ended:
            self._process.terminate()

    def stop(self, *, patience: float = 15.0) -> None:
        """Ask the process to end, and make sure that it and its children do."""
        self.ask_to_stop()
        wait_until(lambda: self.ended, seconds=patience)
        self.kill()

    def kill(self) -> None:
        """End the process and its children at once: SIGKILL, which none of them can see coming."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._gone = True

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the process and its children for a while; they do not notice, and need not be woken to be killed."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if not self._gone:  # afterwards the number of the group may be another's
            with suppress(ProcessLookupError):  # nobody is left in the group
                os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
