"""The kinds of server that the tests want: where each is looked for, and what installs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import pytest

from tests.support.servers.mariadb import PrivateMariaDB
from tests.support.servers.postgresql import PrivatePostgreSQL
from tests.support.servers.private import NotInstalledError, PrivateServer
from tests.support.servers.rabbitmq import PrivateRabbitMQ
from tests.support.servers.reach import why_unreachable
from tests.support.servers.redis import PrivateRedis

__all__ = ["KINDS", "Kind", "missing", "skip_if_not_installed"]


def missing(what: str, why: str) -> NoReturn:
    """Skip the test that runs, or fail it where every server must be there: under ``CI=true``."""
    text = f"{what} is needed and missing: {why}"
    if os.environ.get("CI") == "true":
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


@contextmanager
def skip_if_not_installed(what: str = "a private server") -> Iterator[None]:
    """Skip the test that runs, or fail it under ``CI=true``, if what it starts within this block is not installed."""
    try:
        yield
    except NotInstalledError as error:
        missing(what, str(error))


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of server.

    Attributes:
        name: Its name.
        default_url: Where it is looked for unless the environment says otherwise.
        package: Debian's package of it.
        private: What starts one of our own.
    """

    name: str
    default_url: str
    package: str
    private: type[PrivateServer]

    @property
    def variable(self) -> str:
        """The environment variable that says where it is."""
        return f"CELERY_IDEMPOTENT_TEST_{self.name.upper()}"

    @property
    def url(self) -> str:
        """Where it is looked for."""
        return os.environ.get(self.variable) or self.default_url

    @property
    def chosen(self) -> bool:
        """Whether somebody said where it is: then that one is meant, and none is started in its place."""
        return bool(os.environ.get(self.variable))

    def why_unreachable(self) -> str | None:
        """``None`` when it is there and takes us, else the reason."""
        return why_unreachable(self.url)

    def require(self) -> str:
        """Where it is, for a test that cannot do without; the test is skipped, or fails in CI, when it is not there."""
        why = self.why_unreachable()
        if why is not None:
            missing(f"{self.name} at {self.url}", f"{why} (`make test` starts or installs one)")
        return self.url


KINDS = {
    kind.name: kind
    for kind in (
        Kind("postgresql", "postgresql+psycopg://postgres@127.0.0.1:5432/test", "postgresql", PrivatePostgreSQL),
        Kind("mariadb", "mysql+pymysql://root@127.0.0.1:3306/test", "mariadb-server", PrivateMariaDB),
        Kind("redis", "redis://127.0.0.1:6379", "redis-server", PrivateRedis),
        Kind("rabbitmq", "amqp://guest:guest@127.0.0.1:5672//", "rabbitmq-server", PrivateRabbitMQ),
    )
}
