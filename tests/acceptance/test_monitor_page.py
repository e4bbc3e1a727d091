"""Run what the page "Monitor the queue log" shows, and compare its lists with the code."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry

from celery_idempotent.contrib.prometheus import PrometheusHook
from celery_idempotent.core.records import MessageKey
from celery_idempotent.hooks import Hooks, Outcome, OutcomeKind
from tests.support.servers import PrivateRedis
from tests.support.stores import sqlite_store
from tests.support.waiting import wait_until
from tests.support.worker import ROOT, WorkerProcess

PAGE = (ROOT / "docs" / "how-to" / "monitor.md").read_text()


def block(name: str) -> str:
    """Return the example that begins with a comment of this name."""
    found = re.search(rf"```python\n# {re.escape(name)}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def listed(heading: str) -> list[str]:
    """Return what the first column of a section's table has in code."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)


def test_the_table_has_every_outcome_once() -> None:
    assert sorted(listed("The outcomes")) == sorted(OutcomeKind)


def test_the_table_has_every_series_with_its_labels() -> None:
    registry = CollectorRegistry()
    hook = PrometheusHook(registry)
    hook(Outcome(kind=OutcomeKind.SKIPPED, task_name="t", store=1.0, ran=1.0, age=1.0))
    section = PAGE.split("\n## Prometheus\n")[1]
    rows = {
        name: set(re.findall("`([^`]+)`", labels))
        for name, labels in re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", section, re.MULTILINE)
    }
    exposed = {
        family.name + ("_total" if family.type == "counter" else ""): {
            label for sample in family.samples for label in sample.labels if label != "le"
        }
        for family in registry.collect()
    }
    assert rows == exposed


def test_the_alerts_ask_for_series_and_outcomes_that_there_are() -> None:
    alerts = PAGE.split("```yaml\n")[1].split("```")[0]
    assert set(re.findall('outcome="([^"]+)"', alerts)) <= set(OutcomeKind)
    names = set(re.findall("celery_idempotent_[a-z_]+", alerts))
    assert {re.sub("_bucket$", "", name) for name in names} <= set(listed("Prometheus"))


@pytest.fixture
def json_lines() -> Iterator[None]:
    logger = logging.getLogger("celery_idempotent.outcomes")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_log_lines_with_nothing_but_the_standard_library(json_lines: None, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("json_lines.py"), {})
    outcomes = Hooks.of(["celery_idempotent.contrib.log.hook"])
    assert outcomes is not None
    outcomes.emit(OutcomeKind.CLAIMED, MessageKey("order:o-1", "shop.charge"), token=1)

    line = json.loads(capsys.readouterr().err)
    shown = json.loads(PAGE.split("```json\n")[1].split("```")[0])
    assert {name: line[name] for name in ("outcome", "task_name", "message_id", "token")} == {
        "outcome": "claimed",
        "task_name": "shop.charge",
        "message_id": "order:o-1",
        "token": 1,
    }
    assert set(shown) - set(line) <= {"task_id", "first_task_id", "status", "age"}


def test_a_hook_of_your_own() -> None:
    module: dict[str, Any] = {}
    exec(block("my_hooks.py"), module)
    Hooks([module["page_somebody"]]).emit(OutcomeKind.ABANDONED, MessageKey("order:o-1", "shop.charge"))
    assert module["abandoned"] == ["shop.charge[order:o-1]"]


def test_the_dashboard_is_where_the_command_says() -> None:
    (shown,) = re.findall(r'^\$ python -c "(.*?)"$', PAGE, re.MULTILINE | re.DOTALL)
    command = shown.replace("\\\n", "")  # as a shell reads it
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(Path(done.stdout.strip()).read_text())["title"] == "celery-idempotent"


def test_a_worker_as_shown_answers_prometheus_and_inspect(private_redis: PrivateRedis, tmp_path: Path) -> None:
    text = block("shop.py")
    for shown, ours in (
        ("redis://localhost", private_redis.url),
        ("postgresql://localhost/shop", sqlite_store(tmp_path)),
        ("prometheus.serve(9808)", 'prometheus.serve(0, address="127.0.0.1")'),
    ):
        assert shown in text
        text = text.replace(shown, ours)
    (tmp_path / "shop.py").write_text(text)
    series = tmp_path / "series"
    series.mkdir()
    environment = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "PROMETHEUS_MULTIPROC_DIR": str(series)}
    worker = WorkerProcess(tmp_path, environment, app="shop", concurrency=1)
    try:
        worker.start()
        call = "from shop import charge; r = charge.delay('o-1', 500); r.get(timeout=60); assert charge.delay('o-1', 500).duplicate"

        def python(*arguments: str) -> str:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=tmp_path,
                env={**os.environ, **environment},
                check=True,
                capture_output=True,
                text=True,
            )
            return done.stdout

        python("-c", call)
        worker.wait_for_log("metrics are at http://")
        (address,) = re.findall(r"metrics are at (http://\S+)", worker.log.read_text())

        def answer() -> str:
            with urlopen(address, timeout=60) as page:
                return str(page.read().decode())

        wait_until(
            lambda: 'celery_idempotent_outcomes_total{outcome="completed",task_name="shop.charge"} 1.0' in answer(),
            timeout=60.0,
            describe=answer,
        )
        # The producer's, in the same directory.
        assert 'celery_idempotent_outcomes_total{outcome="duplicate",task_name="shop.charge"} 1.0' in answer()
        asked = ("inspect", "idempotency", "--json", "--destination", worker.hostname, "--timeout", "10")
        assert json.loads(python("-m", "celery", "-A", "shop", *asked)) == {worker.hostname: []}
    finally:
        worker.stop()
