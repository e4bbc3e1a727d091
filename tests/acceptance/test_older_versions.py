"""A part of the tests, on older versions of what the package needs. ``make test-versions`` runs all, on more of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import missing
from tests.support.versions import CELERY, ROOT, Cell, NotToBeHadError

#: What differs most between versions: what Celery tells of lost processes and time limits, and each database's words.
PART = (
    "tests/unit/test_versions.py",
    "tests/contract/test_redis_store.py",
    "tests/integration/test_by_name.py",
    "tests/integration/test_time_limits.py",
    "tests/integration/test_worker_lost.py",
)

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.skipif(CELERY < (5, 7), reason="this is an older version")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cell", [Cell("oldest", "3.11"), Cell("5.6", HERE)], ids=lambda cell: f"celery {cell.celery}")
def test_a_part_passes_on_older_versions(cell: Cell) -> None:
    try:
        python = str(cell.environment() / "bin/python")
    except NotToBeHadError as error:
        missing(f"Python {cell.python}", str(error))
        raise

    done = subprocess.run(
        [python, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", *PART],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        check=False,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
