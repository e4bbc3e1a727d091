"""Run Celery's own tests, guarded, and those that fail with Celery's own task class as well: ``python -m tests.celery_suite``, or ``make celery-suite``.

The tests come from Celery's source distribution, which pip downloads into ``build/celery-suite``; each version has an environment of its own there. They run on a private
Redis. A test that passes with Celery's own task class must pass with ``IdempotentTask`` too, unless ``docs/explanation/celery-suite.md`` names it and says why.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path

from tests.support.servers import PrivateRedis

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PAGE = ROOT / "docs" / "explanation" / "celery-suite.md"

#: The last release of each line of Celery that the suite is run on.
VERSIONS = ("5.6.3", "5.7.0")

PARTS = ("t/unit/tasks", "t/unit/app", "t/unit/worker", "t/integration")

EXTRAS = "redis,sqlalchemy,pymemcache,memcache,auth,yaml,msgpack,pydantic,gevent,azureblockblob"

#: What the tests want besides.
PACKAGES = (
    *("pytest", "pytest-rerunfailures", "pytest-subtests", "pytest-timeout", "pytest-click", "pytest-order"),
    *("freezegun", "fakeredis[lua]", "moto", "boto3", "django", "psutil", "requests"),
)

#: What the tests of a version were written for: redis-py 8 ends a blocking read after a while, which those of 5.6 do not expect.
WRITTEN_FOR = {"5.6.3": ("kombu[redis]<5.7",)}

#: Seconds for one test, and for one process. One of Celery's takes two minutes; if it is cut short, it leaves the session's worker unable to start.
TEST, PROCESS = 300, 3600

Outcomes = dict[str, str]


def main() -> int:
    arguments = _arguments()
    expected = _expected(PAGE.read_text())
    wrong: list[str] = []
    failing: set[str] = set()
    with PrivateRedis(persistent=False) as redis:
        for version in arguments.version:
            suite = Suite(version, arguments.directory, redis)
            suite.prepare()
            for part in arguments.part:
                guarded = suite.run(suite.processes(part), how="guarded")
                failed = _failed(guarded)
                # Again, alone: some of Celery's tests are a matter of luck, or of their place among the others, and some fail on this machine anyway.
                differ = failed & _failed(suite.run(_by_file(failed), how="guarded"))
                differ -= _failed(suite.run(_by_file(differ), how="stock"))
                failing |= differ
                unexpected = sorted(test for test in differ if not _is_named(test, expected))
                print(
                    f"{version} {part}: {len(guarded)} tests, {len(differ)} differ, {len(unexpected)} of them unexpected",
                    flush=True,
                )
                wrong += [f"{version} {test}" for test in unexpected]
    for test in wrong:
        print(f"not in {PAGE.relative_to(ROOT)}: {test}")
    if tuple(arguments.part) == PARTS and tuple(arguments.version) == VERSIONS:
        for pattern in expected:
            if not any(fnmatchcase(test, pattern) for test in failing):
                wrong.append(pattern)
                print(f"passes, so {PAGE.relative_to(ROOT)} need not name it: {pattern}")
    return 1 if wrong else 0


class Suite:
    """The tests of one version of Celery.

    Args:
        version: The version.
        directory: Where its source, its environment and its logs are kept.
        redis: The broker and result backend of the integration tests.
    """

    def __init__(self, version: str, directory: Path, redis: PrivateRedis) -> None:
        self.version = version
        self.directory = (directory / version).absolute()
        self.source = self.directory / f"celery-{version}"
        self.python = self.directory / "env" / "bin" / "python"
        self._redis = redis

    def prepare(self) -> None:
        """Download the source and make the environment, unless they are there."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.source.exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "celery"]
            subprocess.run([*pip, f"celery=={self.version}", "--dest", str(self.directory)], check=True)
            with tarfile.open(self.directory / f"celery-{self.version}.tar.gz") as archive:
                archive.extractall(self.directory, filter="data")
        packages = (f"celery[{EXTRAS}]=={self.version}", *PACKAGES, *WRITTEN_FOR.get(self.version, ()))
        ready, wanted = self.directory / "ready", " ".join(packages)
        if not ready.exists() or ready.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.directory / "env")], check=True)
            install = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*install, *packages], check=True)
            subprocess.run([*install, "--editable", str(ROOT)], check=True)
            ready.write_text(wanted)

    def processes(self, part: str) -> list[list[str]]:
        """Return what to run in one process each: a file of the integration tests, as Celery's own CI does, because a process starts one worker for all."""
        if part != "t/integration":
            return [[part]]
        files = sorted((self.source / part).glob("test_*.py"))
        return [[f"{part}/{file.name}"] for file in files if "def test_" in file.read_text()]

    def run(self, processes: Iterable[Sequence[str]], *, how: str) -> Outcomes:
        """Run tests; how each ended, by its node id."""
        outcomes: Outcomes = {}
        for what in processes:
            outcomes |= self._run(what, how=how)
        return outcomes

    def _run(self, what: Sequence[str], *, how: str) -> Outcomes:
        path, _, alone = what[0].partition("::")
        name = f"{path.replace('/', '-')}-{how}{'-alone' if alone else ''}"
        outcomes = self.directory / f"{name}.outcomes"
        outcomes.write_text("")
        guarded = ["-p", "guarded"] if how == "guarded" else []
        # Some integration tests need a worker, and count on another test to have started it.
        worker = ["-o", "usefixtures=celery_session_worker"] if alone and path.startswith("t/integration") else []
        plugins = ["-p", "celery.contrib.pytest", "-p", "recorded", *guarded, *worker, "-p", "no:cacheprovider"]
        options = [*plugins, "-q", "-rfE", "--durations", "20", "--timeout", str(TEST)]
        with tempfile.TemporaryDirectory() as stores, (self.directory / f"{name}.log").open("w") as log:
            ended = subprocess.run(
                [str(self.python), "-m", "pytest", *options, *what],
                cwd=self.source,
                env={**os.environ, **self._environment(stores, outcomes)},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=PROCESS,
                check=False,  # some fail with Celery's own class, too
            )
        if ended.returncode not in (0, 1):  # pytest's codes for "passed" and "some failed"
            raise SystemExit(f"not every test was run: see {self.directory / name}.log")
        return _read(outcomes.read_text().splitlines())

    def _environment(self, stores: str, outcomes: Path) -> Mapping[str, str]:
        return {
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",  # some run the command `celery`
            "PYTHONPATH": f"{HERE}{os.pathsep}{self.source}",
            "WORKER_LOGLEVEL": "INFO",  # as in Celery's tox.ini; some tests read what a worker logs
            "CELERY_SUITE_STORES": stores,
            "CELERY_SUITE_OUTCOMES": str(outcomes),
            "TEST_BROKER": self._redis.url,
            "TEST_BACKEND": self._redis.url,
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(self._redis.port),
        }


def _read(lines: Iterable[str]) -> Outcomes:
    """Return the outcome of each test; one that failed in any phase, or in a part of it, has failed. One that was run again counts as it ended last."""
    read: Outcomes = {}
    for line in lines:
        outcome, _, test = line.partition(" ")
        if outcome == "rerun":
            read.pop(test, None)
        elif read.get(test) != "failed":
            read[test] = outcome
    return read


def _failed(outcomes: Outcomes) -> set[str]:
    return {test for test, outcome in outcomes.items() if outcome == "failed"}


def _by_file(tests: Iterable[str]) -> list[list[str]]:
    """Return the tests, those of each file in a list, which one process runs."""
    return [list(group) for _, group in groupby(sorted(tests), key=lambda test: test.partition("::")[0])]


def _expected(page: str) -> list[str]:
    """Return the tests that the page names: the first cell of each row, ``*`` and ``?`` stand for anything."""
    return re.findall(r"^\| `(t/[^`]+)` \|", page, flags=re.MULTILINE)


def _is_named(test: str, expected: Sequence[str]) -> bool:
    # A parameter may hold what stands for a pattern in `fnmatch`.
    plain = test.partition("[")[0]
    return any(fnmatchcase(test, pattern) or fnmatchcase(plain, pattern) for pattern in expected)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.celery_suite", description=__doc__)
    parser.add_argument("--version", action="append", help=f"of Celery; by default {' and '.join(VERSIONS)}")
    parser.add_argument("--part", action="append", help=f"of its tests; by default {', '.join(PARTS)}")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "celery-suite")
    arguments = parser.parse_args()
    arguments.version = arguments.version or list(VERSIONS)
    arguments.part = arguments.part or list(PARTS)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
