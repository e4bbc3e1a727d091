"""Real servers for the tests: those that run already, and private ones that a test may stop, kill and pause.

``python -m tests.support.servers COMMAND ...`` runs a command with all of them at hand; see :mod:`.__main__`.
"""

from tests.support.servers.kinds import KINDS, Kind, missing, skip_if_not_installed
from tests.support.servers.mariadb import PrivateMariaDB
from tests.support.servers.pgbouncer import PrivatePgBouncer
from tests.support.servers.postgresql import PrivatePostgreSQL
from tests.support.servers.private import NotInstalledError, PrivateServer, free_port
from tests.support.servers.rabbitmq import PrivateRabbitMQ
from tests.support.servers.redis import PrivateRedis
from tests.support.servers.sentinel import PrivateSentinel

__all__ = [
    "KINDS",
    "Kind",
    "NotInstalledError",
    "PrivateMariaDB",
    "PrivatePgBouncer",
    "PrivatePostgreSQL",
    "PrivateRabbitMQ",
    "PrivateRedis",
    "PrivateSentinel",
    "PrivateServer",
    "free_port",
    "missing",
    "skip_if_not_installed",
]
