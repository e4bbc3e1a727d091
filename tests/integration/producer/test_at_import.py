"""Calls that a module makes while it is imported: the app is not finalized, and its tasks are not all there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

#: The usual project: one module of settings, the app in ``celery.py``, tasks by both decorators.
PROJECT = {
    "__init__.py": "from shop.celery import app as celery_app\n",
    "settings.py": """
CELERY_BROKER_URL = "memory://"
CELERY_RESULT_BACKEND = "cache+memory://"
CELERY_IDEMPOTENT_STORE = "sqlite:///log.db"
CELERY_IDEMPOTENT_ON_DUPLICATE = "skip"
""",
    "celery.py": """
from celery import Celery, shared_task
from celery_idempotent import IdempotentTask

app = Celery("shop")
app.config_from_object("shop.settings", namespace="CELERY")
app.autodiscover_tasks(["shop"])


@app.task(base=IdempotentTask, message_id="own:{number}")
def own(number): ...


@shared_task(base=IdempotentTask, message_id="shared:{number}")
def shared(number): ...


finalized = [app.finalized]
calls = [own.delay(1), own.delay(1), shared.delay(1), shared.delay(1)]
""",
    "tasks.py": """
from celery import shared_task
from celery_idempotent import IdempotentTask


@shared_task(base=IdempotentTask, message_id="later:{number}")
def later(number): ...


calls = [later.delay(1), later.delay(1)]
""",
}

#: A module that uses the project, and tells what became of its calls.
TELL = """
import json
{first}
from shop.celery import app, calls, finalized
from shop.tasks import calls as later
from celery_idempotent.records import RowFilter

print(json.dumps({{
    "finalized": finalized,
    "duplicates": [result.duplicate for result in (*calls, *later)],
    "rows": sorted(row.key.message_id for row in app.queue_log.store.rows(RowFilter())),
}}))
app.close()
"""


def told(tmp_path: Path, first: str) -> dict[str, object]:
    (tmp_path / "shop").mkdir()
    for name, text in PROJECT.items():
        (tmp_path / "shop" / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", TELL.format(first=first)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    answer: dict[str, object] = json.loads(run.stdout)
    return answer


def test_calls_from_celery_py_are_recorded(tmp_path: Path) -> None:
    assert told(tmp_path, "import shop") == {
        "finalized": [False],
        "duplicates": [False, True] * 3,
        "rows": ["later:1", "own:1", "shared:1"],
    }


def test_calls_from_a_module_of_tasks_are_recorded_first(tmp_path: Path) -> None:
    assert told(tmp_path, "import shop.tasks")["duplicates"] == [False, True] * 3
