"""A private RabbitMQ."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.support.servers.private import NotInstalledError, PrivateServer, free_port
from tests.support.waiting import wait_until

__all__ = ["PrivateRabbitMQ"]


class PrivateRabbitMQ(PrivateServer):
    """RabbitMQ with ``guest``/``guest`` on the virtual host ``/``. It takes some seconds to start.

    Args:
        consumer_timeout: Seconds after which a channel is closed that has not acknowledged a delivery; by default half an hour.
    """

    name = "rabbitmq"
    account = "rabbitmq"
    patience = 90.0

    def __init__(self, *, consumer_timeout: float | None = None) -> None:
        super().__init__()
        self.consumer_timeout = consumer_timeout
        # Erlang's nodes find each other through a daemon that outlives them; this node has one to itself.
        self._epmd_port = free_port()
        self._distribution_port = free_port()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def command(self) -> list[str]:
        # Debian's program of this name in /usr/sbin insists on an account; the one that it calls does not.
        debian = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
        found = debian if debian.exists() else shutil.which("rabbitmq-server")
        if found is None:
            raise NotInstalledError("`rabbitmq-server` was not found")
        return [str(found)]

    def environment(self) -> Mapping[str, str]:
        return {
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"test-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "mnesia"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": str(self.directory / "rabbitmq"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.directory / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": str(self.directory / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "enabled_plugins"),
        }

    def prepare(self) -> None:
        if self.consumer_timeout is not None:
            # It is looked at with every tick of a channel, once in a minute unless told otherwise, which only this file can.
            settings = f"{{consumer_timeout, {self.consumer_timeout * 1000:.0f}}}, {{channel_tick_interval, 1000}}"
            (self.directory / "advanced.config").write_text(f"[{{rabbit, [{settings}]}}].\n")

    def kill(self) -> None:
        super().kill()
        epmd = shutil.which("epmd")
        if epmd is None:
            return

        def killed() -> bool:
            command = [epmd, "-port", str(self._epmd_port), "-kill"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
            # Until it has noticed that its node is dead, it refuses.
            return "living nodes" not in done.stdout + done.stderr

        wait_until(killed, timeout=10, describe="the end of the node's epmd")
