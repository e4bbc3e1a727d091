"""Run the tests of the Django app on other versions of Django, and with other drivers: ``python -m tests.support.django_matrix``, or ``make test-django``.

A cell is a Django, a Python and the drivers. Each has an environment of its own under ``.venv-versions``, in which the example's project runs; pytest itself
runs here. mysqlclient is compiled, for which Debian's packages ``libmariadb-dev`` and ``pkg-config`` are installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

from tests.support.servers.__main__ import install
from tests.support.versions import ROOT, UV, interpreter

__all__ = ["CELLS", "Cell"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A Django, a Python, and the drivers of PostgreSQL and MariaDB."""

    django: str
    python: str
    postgresql: str
    mysql: str

    def scheduled(self) -> list[str]:
        """Return django-celery-beat, which 2.9 refuses on Django 6.1, and django-celery-results."""
        return ["django-celery-results", *(["django-celery-beat"] if self.django != "6.1" else [])]

    def environment(self) -> str:
        """Return the Python of the cell's environment, made if it is missing."""
        place = ROOT / f".venv-versions/django-{self.django}-python-{self.python}"
        python = str(place / "bin/python")
        if not (place / "installed").exists():
            print(f"{place.relative_to(ROOT)}: installing Django {self.django} ...", flush=True)
            make = [str(UV), "venv", "--quiet", "--clear", "--python", interpreter(self.python), str(place)]
            subprocess.run(make, check=True)
            packages = [
                f"django=={self.django}.*",
                self.postgresql,
                self.mysql,
                "psutil",
                *self.scheduled(),
                "--editable",
                str(ROOT),
            ]
            subprocess.run([str(UV), "pip", "install", "--quiet", "--python", python, *packages], check=True)
            (place / "installed").touch()
        return python

    def __str__(self) -> str:
        return f"Django {self.django}, Python {self.python}, {self.postgresql}, {self.mysql}"


CELLS = (
    Cell("4.2", "3.11", "psycopg2-binary", "mysqlclient"),
    Cell("5.2", "3.12", "psycopg[binary,pool]", "mysqlclient"),
    Cell("6.0", "3.13", "psycopg[binary,pool]", "pymysql"),
    Cell("6.1", "3.13", "psycopg[binary,pool]", "mysqlclient"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-django", allow_abbrev=False)
    parser.add_argument("--django", choices=[cell.django for cell in CELLS], help="one cell; default: each")
    options, arguments = parser.parse_known_args()
    if shutil.which("mariadb_config") is None:
        install(["libmariadb-dev", "pkg-config"])
    failed = []
    for cell in CELLS:
        if options.django not in (None, cell.django):
            continue
        environment = {
            **os.environ,
            "DJANGO_PYTHON": cell.environment(),
            "DJANGO_MYSQL": cell.mysql,
            "DJANGO_VERSION": cell.django,
        }
        print(f"=== {cell}", flush=True)
        command = [sys.executable, "-m", "tests.support.servers", sys.executable, "-m", "pytest", *arguments]
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            failed.append(str(cell))
    print(f"=== failed: {'; '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
