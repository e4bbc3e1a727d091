"""A pytest plugin that notes how each of Celery's tests ended, a line each: its outcome, and its node id."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_FILE = Path(os.environ["CELERY_SUITE_OUTCOMES"])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a failure of any phase, and what the test itself came to."""
    if report.failed or report.when == "call" or report.skipped:
        with _FILE.open("a") as file:
            file.write(f"{report.outcome} {report.nodeid}\n")
