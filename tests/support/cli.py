"""``celery -A proj idempotent`` in another process, in a project that a test writes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    given = () if app is None else ("-A", app)
    return {
        "args": [sys.executable, "-m", "celery", *given, *arguments],
        "cwd": project,
        "env": {
            **{name: value for name, value in os.environ.items() if not name.startswith("CELERY_")},
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(project)]),
            "PYTHONWARNINGS": "error",
            "STORE": store,
            **environment,
        },
    }
