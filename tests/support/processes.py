"""Process trees: signal all of one, and make sure that all of it ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from typing import Protocol

import psutil

from tests.support.waiting import wait_until

__all__ = ["Process", "kill_tree", "process_tree", "signal_all"]


class Process(Protocol):
    """A process that we started: one of :class:`subprocess.Popen`, or a :class:`tests.support.forked.ForkedProcess`."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def process_tree(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants, parents first; empty when it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def signal_all(processes: Iterable[psutil.Process], signum: signal.Signals) -> None:
    """Send a signal to each process that is still there."""
    for process in processes:
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            continue


def kill_tree(process: Process, *, timeout: float = 15.0) -> None:
    """``SIGKILL`` a child of ours, all its descendants and all of its session, and wait until they are gone.

    They are stopped first, from the root down, so that no parent replaces or outlives a child while the rest is being
    killed: to whoever looks on, all of them die at once, as when a machine loses power. The session is looked through for
    what has lost its parent before.
    """
    if process.poll() is not None and psutil.pid_exists(process.pid):
        return  # its number was given to another process, which is not done while anything of its session is left
    seen: dict[int, psutil.Process] = {}
    while fresh := [found for found in _family(process.pid) if found.pid not in seen]:
        signal_all(fresh, signal.SIGSTOP)
        seen.update((found.pid, found) for found in fresh)
    signal_all(seen.values(), signal.SIGKILL)
    process.wait(timeout=timeout)
    wait_until(lambda: all(map(_is_dead, seen.values())), timeout=timeout, describe=f"the death of {list(seen)}")


def _family(pid: int) -> list[psutil.Process]:
    return [*process_tree(pid), *(other for other in psutil.process_iter() if _session(other.pid) == pid)]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _is_dead(process: psutil.Process) -> bool:
    # A zombie is dead; who reaps an orphan, and when, is the machine's affair.
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
