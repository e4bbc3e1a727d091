"""CPU time of processes and all they have started, by psutil."""

from __future__ import annotations

from collections.abc import Mapping

import psutil

from tests.support.processes import process_tree

__all__ = ["Meter", "cpu_seconds"]


def cpu_seconds(pid: int) -> dict[int, float]:
    """Return what a process and its descendants have computed so far, by process id, those that have ended and were waited for included."""
    found: dict[int, float] = {}
    for process in process_tree(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[process.pid] = times.user + times.system + times.children_user + times.children_system
    return found


class Meter:
    """What some processes compute from now on.

    The system counts in hundredths of a second: measure what takes many of them.

    Args:
        processes: Their process ids, by what they are called.
    """

    def __init__(self, processes: Mapping[str, int]) -> None:
        self._processes = dict(processes)
        self._before = {name: cpu_seconds(pid) for name, pid in self._processes.items()}

    def read(self) -> dict[str, float]:
        """Seconds by name. What a process's children computed is in its own; a worker's pool is told apart as ``<name> pool``."""
        seconds: dict[str, float] = {}
        for name, pid in self._processes.items():
            before = self._before[name]
            spent = {child: at - before.get(child, 0.0) for child, at in cpu_seconds(pid).items()}
            if name == "worker":
                seconds["worker pool"] = sum(at for child, at in spent.items() if child != pid)
                seconds["worker"] = spent.get(pid, 0.0)
            else:
                seconds[name] = sum(spent.values())
        return seconds
