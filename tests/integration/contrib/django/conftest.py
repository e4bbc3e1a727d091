"""The Django project of the example, on each database, driven by its own command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa

from tests.support.worker import ROOT

__all__ = ["Project", "project"]

HERE = Path(__file__).parent
SHOP = ROOT / "example_project" / "django_shop"

#: What runs the project, and the driver of MariaDB: see ``tests/support/django_matrix.py``.
PYTHON, MYSQL = os.environ.get("DJANGO_PYTHON", sys.executable), os.environ.get("DJANGO_MYSQL", "pymysql")

#: What stands in front of the databases' names in the example's settings.
ENGINES = {"postgresql": "django.db.backends.postgresql", "mariadb": "django.db.backends.mysql"}


@dataclass
class Project:
    """A Django project with a database and a broker of its own.

    Attributes:
        database: Its kind: a key of ``ENGINES``, or ``sqlite``.
        environment: The environment of its processes.
        url: Of its database, as SQLAlchemy has it.
    """

    database: str
    environment: dict[str, str]
    url: str
    engine: sa.Engine = field(init=False)

    def __post_init__(self) -> None:
        self.engine = sa.create_engine(self.url, poolclass=sa.NullPool)

    def manage(self, *arguments: str, fails: bool = False, **environment: str) -> str:
        """Run ``manage.py``; what it printed."""
        done = subprocess.run(
            [PYTHON, "-W", "error::DeprecationWarning:celery_idempotent", "manage.py", *arguments],
            cwd=SHOP,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=200,
        )
        assert (done.returncode != 0) is fails, done.stdout[-6000:]
        return done.stdout

    def manage_each(self, *commands: Sequence[str]) -> list[str]:
        """Run commands of ``manage.py`` one after the other in one process, which starts Django once; what each printed."""
        separator = "-- and next --"
        printed = self.shell(
            f"""
import sys
from django.core.management import execute_from_command_line
for command in {[*map(tuple, commands)]}:
    print({separator!r}, flush=True)
    try:
        execute_from_command_line(["manage.py", *command])
    except SystemExit as status:
        if status.code:
            raise
    sys.stdout.flush()
"""
        )
        return printed.split(f"{separator}\n")[1:]

    def shell(self, code: str, *arguments: str, killed: bool = False) -> str:
        """Run code in a process of the project's; what it printed. ``killed``: it kills itself."""
        done = subprocess.run(
            [PYTHON, "-c", f"import django; django.setup()\n{code}", *arguments],
            cwd=SHOP,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == (-9 if killed else 0), done.stderr[-6000:]
        return done.stdout

    def worker(self) -> subprocess.Popen[bytes]:
        """Start a worker of two children."""
        return self.celery("worker", "-c", "2", "-l", "INFO")

    def celery(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start one of Celery's programs, which logs into a file of its own."""
        log = Path(self.environment["SHOP_DATA"]) / f"{arguments[0]}.log"
        with log.open("ab") as output:
            return subprocess.Popen(
                [PYTHON, "-m", "celery", "-A", "project", *arguments],
                cwd=SHOP,
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def scalar(self, statement: str) -> object:
        """Return the first column of the first row."""
        with self.engine.connect() as connection:
            return connection.execute(sa.text(statement)).scalar()


#: For tests that take long and need not run on each database every time: `make test-django` runs them on all.
on_one_database_at_least = pytest.mark.parametrize(
    "project", ["sqlite", *ENGINES] if "DJANGO_PYTHON" in os.environ else ["postgresql"], indirect=True
)


@pytest.fixture(params=["sqlite", *ENGINES])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Project]:
    """Yield the project on an empty database, which is dropped with its test databases."""
    kind: str = request.param
    for folder in ("queue", "control", "results"):
        (tmp_path / folder).mkdir()
    settings = "with_pymysql" if (kind, MYSQL) == ("mariadb", "pymysql") else "project.settings"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "DJANGO_"))},
        "DJANGO_SETTINGS_MODULE": settings,
        "SHOP_SETTINGS": settings,  # for the modules here that change them
        "PYTHONPATH": f"{HERE}{os.pathsep}{SHOP}",
        "SHOP_DATA": str(tmp_path),
    }
    if kind == "sqlite":
        yield Project(kind, environment, f"sqlite:///{tmp_path / 'shop.db'}")
        return
    server = sa.make_url(request.getfixturevalue(f"{kind}_url"))
    name = f"shop_{uuid4().hex[:12]}"
    parts = (ENGINES[kind], name, server.username, server.password, server.host, server.port)
    environment["SHOP_DATABASE"] = ",".join("" if part is None else str(part) for part in parts)
    administrators = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with administrators.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield Project(kind, environment, server.set(database=name).render_as_string(hide_password=False))
        listed = "SELECT datname FROM pg_database" if kind == "postgresql" else "SHOW DATABASES"
        left = [found for (found,) in connection.exec_driver_sql(listed) if name in found]
        for each in left:
            connection.exec_driver_sql(f"DROP DATABASE {each}{' WITH (FORCE)' if kind == 'postgresql' else ''}")
        assert left == [name], "a test run has dropped its own database"
