"""A Redis of one's own."""

from __future__ import annotations

import shutil

from tests.support.servers.private import NotInstalledError, PrivateServer

__all__ = ["PrivateRedis"]


class PrivateRedis(PrivateServer):
    """Redis that writes every change to disk before it answers, so that ``kill`` and ``start`` lose nothing.

    Args:
        persistent: ``False`` for a Redis without persistence, which forgets everything when it is restarted.
        replica_of: Another one, running, whose data it copies.
    """

    name = "redis"
    account = "redis"
    patience = 10.0

    def __init__(self, *, persistent: bool = True, replica_of: PrivateRedis | None = None) -> None:
        super().__init__()
        self.persistent = persistent
        self.replica_of = replica_of

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        program = shutil.which("redis-server")
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
        return [program, *(part for name, value in options.items() for part in (f"--{name}", value))]
