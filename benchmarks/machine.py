"""The machine that a run took place on, and what ran there."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import redis
import sqlalchemy as sa

from benchmarks.subjects import PEERS
from tests.support.servers import PrivateServer
from tests.support.worker import ROOT

__all__ = ["commit", "describe"]

_PACKAGES = (
    *("celery", "kombu", "billiard", "redis", "SQLAlchemy", "psycopg", "PyMySQL"),
    *PEERS,
)


def describe(servers: Mapping[str, PrivateServer], directory: Path) -> dict[str, Any]:
    """Return the machine and the versions of everything.

    Args:
        servers: Those that run.
        directory: On the disk that they write to.
    """
    return {
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "fdatasync_ms": _fdatasync(directory) * 1e3,
        "versions": {
            "Python": platform.python_version(),
            **{name: found for name in _PACKAGES if (found := _installed(name))},
            **{f"{server.name} (server)": _served(server) for server in servers.values()},
            "SQLite": _sqlite(),
        },
    }


def commit() -> str:
    """Return the commit that is measured, with ``+`` when the work tree differs from it."""
    try:
        found = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{found}+" if changed else found


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    ).stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _fdatasync(directory: Path, times: int = 200) -> float:
    """Seconds that it takes to write a page of a log, and to have it on the disk."""
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        began = time.perf_counter()
        for _ in range(times):
            os.write(file.fileno(), b"." * 8192)
            os.fdatasync(file.fileno())
        return (time.perf_counter() - began) / times


def _served(server: PrivateServer) -> str:
    if server.name == "redis":
        with redis.Redis.from_url(server.url) as client:
            return str(client.info("server")["redis_version"])
    engine = sa.create_engine(server.url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return str(connection.scalar(sa.text("SELECT version()"))).removeprefix("PostgreSQL ").partition(" ")[0]


def _sqlite() -> str:
    import sqlite3

    return sqlite3.sqlite_version
