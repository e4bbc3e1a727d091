"""``celery -A proj idempotent`` in another process, in a project that a test writes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.forked import ForkedProcess
from tests.support.worker import run_celery

ROOT = Path(__file__).resolve().parents[2]

PROJECT = """
import os
from celery import Celery
from celery_idempotent import IdempotentTask

app = Celery("proj", broker=os.environ.get("BROKER", "memory://"), backend="cache+memory://")
app.conf.update(idempotent_store=os.environ["STORE"], **eval(os.environ.get("SETTINGS", "{}")))

@app.task(base=IdempotentTask, name="shop.charge", message_id="order:{order_id}")
def charge(order_id, amount=0):
    return amount
"""

#: A module that only the setting `imports` names.
IMPORTED = """
from proj import app
from celery_idempotent import IdempotentTask

@app.task(base=IdempotentTask, name="shop.late")
def late(amount):
    return amount
"""

SETTINGS = {
    "imports": ["imported"],
    "idempotent_lost_after": 300,
    "idempotent_retention": 86400,
    "broker_transport_options": {"socket_connect_timeout": 2},
}

Run = subprocess.CompletedProcess[str]
RunCelery = Callable[..., Run]


def popen_arguments(project: Path, *arguments: str, app: str | None, store: str, **environment: str) -> dict[str, Any]:
    """Return what starts ``celery -A proj ...``: arguments of :class:`subprocess.Popen`."""
    return {
        "args": [sys.executable, "-m", "celery", *_command(arguments, app)],
        "cwd": project,
        "env": {
            **{name: value for name, value in os.environ.items() if not name.startswith("CELERY_")},
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(project)]),
            "PYTHONWARNINGS": "error",
            "STORE": store,
            **environment,
        },
    }


def _command(arguments: Sequence[str], app: str | None) -> list[str]:
    return [*(() if app is None else ("-A", app)), *arguments]


def run_celery_once(project: Path, *arguments: str, app: str | None, store: str, **environment: str) -> Run:
    """Run ``celery -A proj ...`` without a terminal, and wait for its end.

    It is forked with Celery imported, which spares a second of a processor, unless its environment has what Python reads as it starts.
    """
    given = popen_arguments(project, *arguments, app=app, store=store, **environment)
    if any(name.startswith("PYTHON") for name in environment):
        return subprocess.run(
            **given,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=100,
            check=False,
        )
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        command = ["celery", *_command(arguments, app)]
        process = ForkedProcess(
            *(_be_celery, command, output), log=errors, directory=given["cwd"], environment=given["env"]
        )
        try:
            status = process.wait(timeout=100)
        finally:
            process.kill()
        return Run(command, status, output.read_text("utf-8"), errors.read_text("utf-8"))


def _be_celery(command: list[str], output: Path) -> None:
    """Be the command in a forked process; what it prints goes to a file of its own, and a warning is an error."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.close(descriptor)
    warnings.simplefilter("error")
    run_celery(command)
