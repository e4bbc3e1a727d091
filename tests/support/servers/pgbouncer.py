"""A private PgBouncer in transaction pooling: each transaction gets any free connection."""

from __future__ import annotations

import shutil
import signal

from sqlalchemy import make_url

from tests.support.servers.private import NotInstalledError, PrivateServer

__all__ = ["PACKAGE", "PrivatePgBouncer", "is_installed"]

#: Debian's package.
PACKAGE = "pgbouncer"


class PrivatePgBouncer(PrivateServer):
    """PgBouncer before a PostgreSQL, with fewer connections to it than it has clients.

    Args:
        url: The PostgreSQL's URL; its password, if it has one, goes into the file of settings.
        pool_size: Connections to it, for each database.
        settings: Settings besides, and in the place of those here.
    """

    name = "pgbouncer"
    account = "postgres"
    patience = 15.0
    # At once. SIGINT would wait for clients to go.
    stop_signal = signal.SIGTERM

    def __init__(self, url: str, *, pool_size: int = 4, settings: dict[str, str] | None = None) -> None:
        super().__init__()
        self._target = make_url(url)
        self._settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "pool_mode": "transaction",
            "default_pool_size": str(pool_size),
            "max_client_conn": "500",
            # Clients say nothing of who they are, and are the one that the database's line names.
            "auth_type": "any",
            "server_login_retry": "1",
            "log_connections": "0",
            "log_disconnections": "0",
            **(settings or {}),
        }

    @property
    def url(self) -> str:
        ours = self._target.set(host="127.0.0.1", port=self.port)
        return ours.render_as_string(hide_password=False)

    def command(self) -> list[str]:
        return [_program(), str(self.directory / "pgbouncer.ini")]

    def prepare(self) -> None:
        target = {
            "host": self._target.host or "127.0.0.1",
            "port": str(self._target.port or 5432),
            "user": self._target.username or "postgres",
            **({} if self._target.password is None else {"password": str(self._target.password)}),
        }
        lines = [
            "[databases]",
            f"* = {' '.join(f'{name}={value}' for name, value in target.items())}",
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in self._settings.items()),
        ]
        file = self.directory / "pgbouncer.ini"
        file.write_text("\n".join(lines) + "\n")
        if self._user is not None:
            shutil.chown(file, self._user)


def is_installed() -> bool:
    """Return whether its program is on this machine."""
    try:
        _program()
    except NotInstalledError:
        return False
    return True


def _program() -> str:
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise NotInstalledError("`pgbouncer` was not found")
    return found
