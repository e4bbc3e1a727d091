"""A user's project and its tests, run by a pytest of their own with the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from tests.support.worker import ROOT

__all__ = ["RunTests"]

#: Runs tests with the plugin; returns what pytest printed. Takes the files' texts by their names without ``.py``.
RunTests = Callable[..., str]

SHOP = """
from celery import Celery
from celery_idempotent import IdempotentTask

app = Celery("shop", broker="memory://", backend="cache+memory://")
app.conf.update(task_always_eager=True, idempotent_store="sqlite:///real.db")
RUNS = []


@app.task(base=IdempotentTask, message_id="order:{order_id}", acks_late=True)
def charge(order_id, amount):
    RUNS.append(order_id)
    return f"charged {amount}"


@app.task(base=IdempotentTask)
def resize(image_id):
    RUNS.append(image_id)
"""


@pytest.fixture
def run_tests(tmp_path: Path) -> RunTests:
    """Return a function that runs a project's tests, which pass unless it says otherwise."""

    def run_tests(*options: str, fails: bool = False, ini: str = "", **files: str) -> str:
        folder = tmp_path / "project"
        folder.mkdir(exist_ok=True)
        (folder / "pytest.ini").write_text(f"[pytest]\nfilterwarnings = error\n{ini}\n")
        for name, text in {"shop": SHOP, **files}.items():
            (folder / f"{name}.py").write_text(dedent(text))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "celery_idempotent.pytest_plugin", "-q", "--tb=short", *options],
            cwd=folder,
            # By its name, whether or not this environment has been installed since the plugin has an entry point.
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=390,
        )
        assert (done.returncode != 0) is fails, done.stdout[-8000:] + done.stderr[-2000:]
        return done.stdout

    return run_tests
