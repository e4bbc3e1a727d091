"""The tutorial, word by word: its files are written, its lines are typed, and what it says is printed is printed."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.apps import AppSpec
from tests.support.flower import FlowerProcess
from tests.support.pages import ROOT, blocks
from tests.support.servers import PrivateRedis
from tests.support.waiting import wait_until
from tests.support.worker import WorkerProcess

PAGE = "docs/tutorial/first-hour.md"
_SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Terminal:
    """Where the reader sits: a directory, and a worker that may be running."""

    def __init__(self, directory: Path, redis: str) -> None:
        self.directory = directory
        self.redis = redis
        self.worker: WorkerProcess | None = None
        self.flower: FlowerProcess | None = None
        scripts = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{directory}",
        }
        self.typed = 0

    def write(self, text: str) -> None:
        comment, _, rest = text.partition("\n")
        name = comment.removeprefix("# ").removesuffix(", at its end")
        assert name == "shop.py"
        if comment.endswith(", at its end"):
            with (self.directory / name).open("a") as module:
                module.write(f"\n{rest}")
            return
        assert text.count('"redis://localhost"') == 2
        (self.directory / name).write_text(text.replace("redis://localhost", self.redis))

    def type(self, text: str) -> None:
        """Type what follows each dollar sign, and compare the output with the lines below it."""
        assert text.startswith("$ ")
        for command in ("\n" + text).split("\n$ ")[1:]:
            line, _, shown = command.partition("\n")
            self.typed += 1
            match line.split():
                case ["pip", "install", *_]:
                    continue
                case ["celery", "-A", "shop", "worker"]:
                    self.start_worker()
                    continue
                case ["celery", "-A", "shop", "flower"]:
                    self.start_flower()
                    continue
            done = subprocess.run(
                line,
                shell=True,
                cwd=self.directory,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == (3 if "errors: 0, warnings: " in shown else 0), done.stdout + done.stderr
            if shown.strip():
                checker = doctest.OutputChecker()
                assert checker.check_output(shown, done.stdout, _SAME), f"$ {line}\n{done.stdout}\n--- shown:\n{shown}"

    def talk(self, text: str) -> None:
        """Have a Python session of its own say what is shown."""
        self.typed += 1
        session = self.directory / "session.txt"
        session.write_text(text)
        command = [sys.executable, "-m", "doctest", "-o", "ELLIPSIS", str(session)]
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start_worker(self) -> None:
        self.stop_worker()
        environment = {"PYTHONPATH": self.environment["PYTHONPATH"]}
        self.worker = WorkerProcess(self.directory, environment, app="shop").start()

    def start_flower(self) -> None:
        spec = AppSpec(
            broker=self.redis, backend=self.redis, store="sqlite://", queue="celery", ledger=""
        )  # not read by this app
        environment = {"PYTHONPATH": self.environment["PYTHONPATH"]}
        self.flower = FlowerProcess(self.directory, spec, environment=environment, app="shop").__enter__()

    def stop_worker(self) -> None:
        if self.worker is not None:
            self.worker.terminate()
            self.worker = None


@pytest.mark.timeout(240)
def test_the_tutorial_works_as_written(tmp_path: Path, private_redis: PrivateRedis) -> None:
    terminal = Terminal(tmp_path, private_redis.url)
    try:
        for block in blocks(PAGE):
            match block.language:
                case "python":
                    terminal.write(block.text)
                case "pycon":
                    terminal.talk(block.text)
                case "console":
                    terminal.type(block.text)
                case other:
                    raise AssertionError(f"{block}: what is {other!r}?")
        flower = terminal.flower
        assert flower is not None
        wait_until(lambda: "order:o-1" in flower.get("/queue-log").text, timeout=30, describe=flower.log_tail)
    finally:
        if terminal.flower is not None:
            terminal.flower.__exit__(None, None, None)
        if terminal.worker is not None:
            terminal.worker.stop()
    assert terminal.typed > 15
