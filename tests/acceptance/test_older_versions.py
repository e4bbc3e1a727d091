"""A part of the tests, on older versions of the dependencies. ``make test-versions`` runs all tests, on more versions."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from celery_idempotent.testing.claiming import ClaimContract
from celery_idempotent.testing.ending import EndingContract
from celery_idempotent.testing.transactions import TransactionContract
from tests.support.servers import missing
from tests.support.versions import CELERY, ROOT, Cell, NotToBeHadError

LIMITS = "tests/integration/worker/test_time_limits.py"


def contracts(store: str, *contracts: type) -> list[str]:
    return [f"{store}::{name}" for contract in contracts for name in vars(contract) if name.startswith("test_")]


#: What differs most between versions: what Celery tells of lost processes, time limits and calls by name, and what the
#: clients of databases say.
PART = (
    "tests/unit/stores/sql/test_versions.py",
    *contracts("tests/contract/test_redis_store.py::TestRedis", ClaimContract, EndingContract),
    *contracts("tests/contract/test_sql_store.py::TestPostgreSQL", ClaimContract, TransactionContract),
    *contracts("tests/contract/test_sql_store.py::TestMariaDB", ClaimContract, TransactionContract),
    "tests/integration/producer/test_by_name.py",
    f"{LIMITS}::test_the_soft_limit_is_a_failure",
    f"{LIMITS}::test_a_body_that_heeds_the_soft_limit_succeeds",
    f"{LIMITS}::test_the_hard_limit_is_a_failure",
    f"{LIMITS}::test_the_hard_limit_gives_an_unacknowledged_message_back",
    "tests/integration/worker/test_worker_lost.py",
)

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"

#: Hypothesis, which no test of the part needs, is otherwise parsed as the last thing. On Python before 3.11.8 that can fail
#: while a result is collected: https://github.com/python/cpython/issues/106905.
WITHOUT = ("cacheprovider", "hypothesispytest")


@pytest.mark.skipif(CELERY < (5, 7), reason="this is an older version")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cell", [Cell("oldest", "3.11"), Cell("5.6", HERE)], ids=lambda cell: f"celery {cell.celery}")
def test_a_part_passes_on_older_versions(cell: Cell) -> None:
    try:
        python = str(cell.environment() / "bin/python")
    except NotToBeHadError as error:
        missing(f"Python {cell.python}", str(error))

    without = [argument for plugin in WITHOUT for argument in ("-p", f"no:{plugin}")]
    # A part of them passes; on what is oldest, all can be imported too.
    for arguments in ([["--collect-only"]] if cell.celery == "oldest" else []) + [[*PART]]:
        done = subprocess.run(
            [python, "-m", "pytest", "--quiet", *without, *arguments],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
