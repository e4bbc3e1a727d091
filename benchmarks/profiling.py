"""Where the time goes: cProfile for a producer, py-spy for a worker."""

from __future__ import annotations

import cProfile
import io
import json
import os
import pstats
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from benchmarks.producer import Order, publish
from benchmarks.subjects import PLAIN, STORES
from benchmarks.testbed import Deployment, open_testbed
from tests.support.waiting import wait_until
from tests.support.worker import ROOT

__all__ = ["profile"]

#: Samples per second of a worker.
RATE = 500


def profile(what: str, store: str, *, task: str, count: int, lines: int) -> str:
    """Profile a producer, or a worker.

    Args:
        what: ``publish`` or ``consume``.
        store: Which one; or ``plain``, for plain Celery.
        task: Which task.
        count: Messages.
        lines: Of each list.

    Returns:
        The functions in which most time was spent, and those under which it was.

    Raises:
        AssertionError: The messages were not published, or have not run; or py-spy may not look at other processes here.
    """
    subject = {PLAIN.name: PLAIN, **STORES}[store]
    with open_testbed([subject]) as testbed:
        (deployment,) = testbed.deployments.values()
        return (_of_producer if what == "publish" else _of_worker)(deployment, task, count, lines)


def _of_producer(deployment: Deployment, task: str, count: int, lines: int) -> str:
    # In a process of its own, as a producer is.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.profiling", json.dumps(asdict(Order("single", task, 1, count))), str(lines)],
        cwd=ROOT,
        env={**os.environ, **deployment.place.environment()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    deployment.discard(count + _WARM)
    return done.stdout


_WARM = 300


def _in_producer(order: Order, lines: int) -> str:
    publish(Order(order.how, order.task, order.first + order.count, _WARM))
    profiler = cProfile.Profile()
    profiler.runcall(publish, order)
    told = io.StringIO()
    found = pstats.Stats(profiler, stream=told)
    for by in ("tottime", "cumulative"):
        found.sort_stats(by).print_stats(lines)
    return told.getvalue()


def _of_worker(deployment: Deployment, task: str, count: int, lines: int) -> str:
    deployment.start_worker()
    worker = deployment.worker
    assert worker is not None
    numbers, _ = deployment.publish(count, how="batch", task=task)
    samples, log = deployment.directory / "samples", deployment.directory / "py-spy.log"
    worker.resume()
    with log.open("wb") as told:
        spy = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(worker.pid), "--subprocesses"),
                *("--format", "raw", "--rate", str(RATE), "--nonblocking", "--duration", "unlimited"),
                *("--output", str(samples)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=subprocess.STDOUT,
        )
    deployment.wait_for(numbers)
    spy.send_signal(signal.SIGINT)
    spy.wait(timeout=60)
    wait_until(samples.exists, timeout=5, describe=lambda: f"py-spy's samples: {log.read_text()[-2000:]}")
    ran = deployment.marks.ran(numbers.start, count)
    head = f"{count} tasks in {ran.seconds:.2f} s, while they were sampled {RATE} times per second\n"
    stacks = list(_stacks(samples.read_text().splitlines()))
    return head + "\n".join(
        _told(what, [stack for stack in stacks if stack.in_child is in_child], lines)
        for what, in_child in (("main process", False), ("pool", True))
    )


class _Stack(NamedTuple):
    """Frames from the outermost on, how often they were seen, and whether in a process that another one has started."""

    frames: list[str]
    number: int
    in_child: bool


def _stacks(samples: Iterable[str]) -> Iterator[_Stack]:
    for line in samples:
        stack, _, number = line.rpartition(" ")
        frames = stack.split(";")
        # A process is the outermost frame of its own, and of its children's.
        processes = sum(frame.startswith("process ") for frame in frames)
        yield _Stack(frames[processes:] or frames[-1:], int(number), processes > 1)


def _told(what: str, stacks: Iterable[_Stack], lines: int) -> str:
    own: Counter[str] = Counter()
    under: Counter[str] = Counter()
    total = 0
    for frames, number, _ in stacks:
        total += number
        own[frames[-1]] += number
        for frame in {frame.rpartition(":")[0] or frame for frame in frames}:
            under[frame] += number
    told = [f"\n{what}: {total} samples, {total / RATE:.2f} s"]
    for head, counts in (("in the line itself", own), ("in the function and what it calls", under)):
        told += [
            f"  {head}",
            *(f"  {number / max(total, 1):7.1%}  {name}" for name, number in counts.most_common(lines)),
        ]
    return "\n".join(told)


if __name__ == "__main__":
    print(_in_producer(Order(**json.loads(sys.argv[1])), int(sys.argv[2])))
