"""A private MariaDB."""

from __future__ import annotations

import shutil
from pathlib import Path

import sqlalchemy as sa

from tests.support.servers.private import NotInstalledError, PrivateServer

__all__ = ["PrivateMariaDB"]


class PrivateMariaDB(PrivateServer):
    """MariaDB with ``root`` without a password, and an empty database ``test``."""

    name = "mariadb"
    account = "mysql"
    patience = 60.0

    @property
    def url(self) -> str:
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/test"

    @property
    def empty_url(self) -> str:
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/mysql"

    def prepare(self) -> None:
        self.run(
            *(_program("mariadb-install-db"), "--no-defaults", f"--datadir={self.directory / 'data'}"),
            *("--auth-root-authentication-method=normal", "--skip-test-db", self._tmpdir),
        )

    def command(self) -> list[str]:
        return [
            *(_program("mariadbd"), "--no-defaults", f"--datadir={self.directory / 'data'}"),
            *("--bind-address=127.0.0.1", f"--port={self.port}", f"--socket={self.directory / 'socket'}"),
            # As Debian's configuration has it; the compiled-in default is Latin-1.
            *("--character-set-server=utf8mb4", "--collation-server=utf8mb4_general_ci"),
            *("--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=2", self._tmpdir),
        ]

    @property
    def _tmpdir(self) -> str:
        # A server that starts deletes what it takes for its own in there: two that share one take each other's.
        return f"--tmpdir={self.directory}"

    def furnish(self) -> None:
        engine = sa.create_engine(self.empty_url, poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.execute(sa.text("CREATE DATABASE test"))


def _program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise NotInstalledError(f"MariaDB's `{name}` was not found")
    return str(Path(found))
