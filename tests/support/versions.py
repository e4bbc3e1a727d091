"""Run tests on other versions of what the package needs: ``python -m tests.support.versions [OPTION ...] [ARGUMENT OF PYTEST ...]``.

A cell is a set of dependencies and a Python. The sets are lock files, which ``make lock`` renews: the oldest that ``pyproject.toml``
admits, the last Celery of each older series, and the newest of everything. Each cell has an environment of its own under
``.venv-versions``, made anew when its lock file or ``pyproject.toml`` is newer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from celery import VERSION

__all__ = ["CELERY", "CELLS", "PYTHONS", "ROOT", "SETS", "UV", "Cell", "NotToBeHadError", "interpreter"]

#: The Celery of this environment, to be compared with ``(5, 7)``.
CELERY = (VERSION.major, VERSION.minor)

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = ROOT / "pyproject.toml"
UV = Path(sys.executable).parent / "uv"

#: The sets of dependencies, by what ``--celery`` calls them.
SETS = {
    "oldest": ROOT / "requirements/oldest.lock",
    "5.5": ROOT / "requirements/celery-5.5.lock",
    "5.6": ROOT / "requirements/celery-5.6.lock",
    "5.7": ROOT / "requirements/dev.lock",
}

PYTHONS = ("3.11", "3.12", "3.13", "3.14")


class NotToBeHadError(Exception):
    """There is no such Python here, and none to be downloaded."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A set of dependencies and a Python.

    Attributes:
        celery: A key of :data:`SETS`.
        python: ``3.12`` and the like.
    """

    celery: str
    python: str

    def environment(self) -> Path:
        """Return the cell's environment, made if it is missing or older than what it is made of.

        Raises:
            NotToBeHadError: There is no such Python.
        """
        lock, place = SETS[self.celery], ROOT / f".venv-versions/celery-{self.celery}-python-{self.python}"
        installed = place / "installed"
        made = installed.stat().st_mtime if installed.exists() else 0.0
        if made > max(lock.stat().st_mtime, PYPROJECT.stat().st_mtime):
            return place
        print(f"{place.relative_to(ROOT)}: installing {lock.relative_to(ROOT)} ...", flush=True)
        made_venv = subprocess.run(
            [str(UV), "venv", "--quiet", "--clear", "--python", interpreter(self.python), str(place)],
            check=False,
            stderr=subprocess.PIPE,
            text=True,
        )
        if made_venv.returncode:
            raise NotToBeHadError(made_venv.stderr)
        install = [str(UV), "pip", "install", "--quiet", "--python", str(place / "bin/python"), "--no-deps"]
        subprocess.run([*install, "--require-hashes", "--requirements", str(lock)], check=True)
        subprocess.run([*install, "--no-build-isolation", "--editable", str(ROOT)], check=True)
        installed.touch()
        return place

    def run(self, arguments: list[str]) -> bool:
        """Run pytest with these arguments, on real servers; whether it passed."""
        python = str(self.environment() / "bin/python")
        print(f"=== {self}: {' '.join(arguments)}", flush=True)
        command = [python, "-m", "tests.support.servers", python, "-m", "pytest", *arguments]
        return subprocess.run(command, cwd=ROOT, check=False).returncode == 0

    def __str__(self) -> str:
        return f"Celery {self.celery}, Python {self.python}"


#: What ``make test-versions`` runs: each older set on a Python that its users have, and the newest on every Python.
CELLS = [
    Cell("oldest", "3.11"),
    Cell("5.5", "3.12"),
    Cell("5.6", "3.13"),
    *(Cell("5.7", python) for python in PYTHONS),
]


def interpreter(version: str) -> str:
    """Return a Python of this version that starts, as a shim of pyenv need not; else its number, for uv to download one."""
    name = f"python{version}"
    places = [*os.get_exec_path(), *sorted(map(str, Path.home().glob(f".pyenv/versions/{version}*/bin")))]
    for candidate in (os.path.join(place, name) for place in places):  # noqa: PTH118 - of PATH, which may name anything
        if os.access(candidate, os.X_OK):
            started = subprocess.run([candidate, "-c", ""], check=False, capture_output=True)
            if started.returncode == 0:
                return candidate
    return version


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-versions", allow_abbrev=False)
    parser.add_argument("--celery", choices=SETS, help="one set of dependencies; default: each")
    parser.add_argument("--python", help="one Python, such as 3.12; default: those of the set")
    options, arguments = parser.parse_known_args()
    cells = [cell for cell in CELLS if options.celery in (None, cell.celery) and options.python in (None, cell.python)]
    if not cells:
        cells = [Cell(options.celery or "5.7", options.python)]
    failed: list[str] = []
    for cell in cells:
        try:
            passed = cell.run(arguments)
        except NotToBeHadError as error:
            print(f"=== {cell}: NOT RUN, there is no such Python:\n{error}", flush=True)
            passed = len(cells) > 1
        if not passed:
            failed.append(str(cell))
    print(f"=== failed: {'; '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
