"""A pytest plugin for Celery's own tests, guarded or not: it notes how each ended, and lets one that is run again wait longer.

A line of the notes is an outcome and a node id.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

_FILE = Path(os.environ["CELERY_SUITE_OUTCOMES"])

#: How many times longer a test that is run again may wait. Celery's tests allow a second for fifty tasks, and 60 for a thousand. A busy machine needs more, and
#: sooner so with the guard. What the guard costs is for the benchmarks to say.
PATIENCE = 10


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Function]) -> None:
    """Lengthen the pauses and limits of the tests' modules, if the tests are named one by one."""
    if any("::" in named for named in config.args):
        for module in {item.module for item in items}:
            if hasattr(module, "TIMEOUT"):
                module.TIMEOUT *= PATIENCE
            if getattr(module, "sleep", None) is time.sleep:
                module.sleep = lambda seconds: time.sleep(seconds * PATIENCE)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a failure of any phase, and what the test itself came to."""
    if report.failed or report.when == "call" or report.skipped:
        with _FILE.open("a") as file:
            file.write(f"{report.outcome} {report.nodeid}\n")
