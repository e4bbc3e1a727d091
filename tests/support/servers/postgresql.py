"""A private PostgreSQL."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import sqlalchemy as sa

from tests.support.servers.private import NotInstalledError, PrivateServer

__all__ = ["PrivatePostgreSQL"]


class PrivatePostgreSQL(PrivateServer):
    """PostgreSQL with one role, ``postgres``, trusted, and an empty database ``test``."""

    name = "postgresql"
    account = "postgres"
    # "Fast": end the sessions, write everything. SIGTERM would wait for clients to go.
    stop_signal = signal.SIGINT

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/test"

    @property
    def empty_url(self) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def prepare(self) -> None:
        self.run(
            *(str(_program("initdb")), "--pgdata", str(self.directory / "data")),
            *("--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"),
        )

    def command(self) -> list[str]:
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.directory),
            # A killed process loses nothing that was handed to the kernel; only a machine that loses power would.
            "fsync": "off",
            "full_page_writes": "off",
            "shared_buffers": "32MB",
        }
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        return [str(_program("postgres")), "-D", str(self.directory / "data"), "-p", str(self.port), *settings]

    def furnish(self) -> None:
        engine = sa.create_engine(self.empty_url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.execute(sa.text("CREATE DATABASE test"))


def _program(name: str) -> Path:
    """Return the newest installed version's program; Debian keeps the server's programs off the path."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4]))
    found = debian[-1] if debian else shutil.which(name)
    if found is None:
        raise NotInstalledError(f"PostgreSQL's `{name}` was not found")
    return Path(found)
