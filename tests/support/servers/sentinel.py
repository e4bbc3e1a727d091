"""A Redis with a replica, and the Sentinel that makes the replica the master when the master is gone."""

from __future__ import annotations

import shutil

from tests.support.servers.private import NotInstalledError, PrivateServer
from tests.support.servers.redis import PrivateRedis

__all__ = ["PrivateSentinel"]


class PrivateSentinel(PrivateServer):
    """A Sentinel that alone decides, after a second.

    Args:
        master: What it watches; running. The replicas it finds out from there.
    """

    name = "sentinel"
    account = "redis"
    patience = 10.0

    #: How clients name what it watches.
    MASTER = "test"

    def __init__(self, master: PrivateRedis) -> None:
        super().__init__()
        self._master = master

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def broker_url(self) -> str:
        """The broker, wherever it is at the moment; needs the transport option ``master_name``."""
        return f"sentinel://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        program = shutil.which("redis-server")
        if program is None:
            raise NotInstalledError("`redis-server` was not found")
        return [program, str(self.directory / "sentinel.conf"), "--sentinel"]

    def prepare(self) -> None:
        # It keeps what it learns in there, so the file and its folder must be its own.
        file = self.directory / "sentinel.conf"
        lines = (
            "bind 127.0.0.1",
            f"port {self.port}",
            f"dir {self.directory}",
            f"sentinel monitor {self.MASTER} 127.0.0.1 {self._master.port} 1",
            f"sentinel down-after-milliseconds {self.MASTER} 1000",
            # A failover that came to nothing, on a machine that has other things to do, is tried again after twice as long.
            f"sentinel failover-timeout {self.MASTER} 6000",
        )
        file.write_text("\n".join(lines) + "\n")
        if self._user is not None:
            shutil.chown(file, self._user)
