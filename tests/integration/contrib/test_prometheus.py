"""Series: what the hook counts, also in the children of a prefork worker, and what its worker answers to a scraper."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from celery_idempotent.contrib import prometheus
from celery_idempotent.contrib.prometheus import PrometheusHook
from celery_idempotent.hooks import Outcome, OutcomeKind
from tests.support.apps import AppSpec, OpenApp
from tests.support.waiting import TIMEOUT, wait_until
from tests.support.worker import Pool, StartWorker, WorkerProcess

ROOT = Path(__file__).resolve().parents[3]

Series = dict[tuple[str, str, str], float]


def parsed(text: str) -> Series:
    """Return the samples by name, task and outcome."""
    return {
        (sample.name, sample.labels.get("task_name", ""), sample.labels.get("outcome", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def test_each_outcome_is_counted_with_its_durations() -> None:
    registry = CollectorRegistry()
    hook = PrometheusHook(registry)
    of = {"task_name": "shop.charge", "message_id": "order:o-1", "task_id": "t"}
    hook(Outcome(kind=OutcomeKind.RECORDED, store=0.25, **of))  # type: ignore[arg-type]
    hook(Outcome(kind=OutcomeKind.COMPLETED, store=0.5, ran=2.0, **of))  # type: ignore[arg-type]
    hook(Outcome(kind=OutcomeKind.SKIPPED, age=60.0, **of))  # type: ignore[arg-type]
    hook(Outcome(kind=OutcomeKind.TAKEN_OVER, age=60.0, **of))  # type: ignore[arg-type]
    hook(Outcome(kind=OutcomeKind.PURGED, count=200))

    text = generate_latest(registry).decode()
    series = parsed(text)
    assert series == {
        ("celery_idempotent_outcomes_total", "shop.charge", "recorded"): 1,
        ("celery_idempotent_outcomes_total", "shop.charge", "completed"): 1,
        ("celery_idempotent_outcomes_total", "shop.charge", "skipped"): 1,
        ("celery_idempotent_outcomes_total", "shop.charge", "taken_over"): 1,
        ("celery_idempotent_outcomes_total", "", "purged"): 200,
        ("celery_idempotent_store_seconds_count", "", "recorded"): 1,
        ("celery_idempotent_store_seconds_sum", "", "recorded"): 0.25,
        ("celery_idempotent_store_seconds_count", "", "completed"): 1,
        ("celery_idempotent_store_seconds_sum", "", "completed"): 0.5,
        ("celery_idempotent_run_seconds_count", "shop.charge", "completed"): 1,
        ("celery_idempotent_run_seconds_sum", "shop.charge", "completed"): 2.0,
        ("celery_idempotent_duplicate_age_seconds_count", "shop.charge", "skipped"): 1,
        ("celery_idempotent_duplicate_age_seconds_sum", "shop.charge", "skipped"): 60.0,
    }
    assert "o-1" not in text


@pytest.fixture
def multiprocess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory for the workers that the test starts; this process has imported the library before, and counts in memory."""
    directory = tmp_path / "series"
    directory.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory))
    return directory


def scrape(worker: WorkerProcess) -> Series:
    worker.wait_for_log("metrics are at http://")
    (address,) = re.findall(r"metrics are at (http://\S+)", worker.log.read_text())
    with urlopen(address, timeout=TIMEOUT) as answer:  # of ours
        return parsed(answer.read().decode())


def measured(spec: AppSpec) -> AppSpec:
    return replace(
        spec,
        tasks=(*spec.tasks, "tests.support.apps.outcomes", "tests.support.apps.measured"),
        settings={**spec.settings, "idempotent_hooks": ["celery_idempotent.contrib.prometheus.hook"]},
    )


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("broker", ["redis"], indirect=True)
class TestAWorker:
    def test_a_prefork_worker_answers_for_its_children_and_for_those_that_died(
        self, spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, multiprocess: Path, tmp_path: Path
    ) -> None:
        app = open_app(replace(spec, tasks=(*spec.tasks, "tests.support.apps.outcomes")))
        worker = start_worker(measured(spec), concurrency=2)
        for number in range(6):
            app.tasks["add"].delay(number, 1).get(timeout=TIMEOUT)
        app.tasks["die.early"].apply_async((str(tmp_path / "flag"),)).get(timeout=TIMEOUT, propagate=False)
        app.tasks["fail"].apply_async().get(timeout=TIMEOUT, propagate=False)

        def counted() -> Series | None:
            series = scrape(worker)
            enough = series.get(("celery_idempotent_outcomes_total", "add", "completed")) == 6
            return series if enough and ("celery_idempotent_outcomes_total", "fail", "failed") in series else None

        series = wait_until(counted, describe=lambda: f"all series: {scrape(worker)}")
        assert series["celery_idempotent_outcomes_total", "add", "claimed"] == 6
        assert series["celery_idempotent_run_seconds_count", "add", "completed"] == 6
        assert series["celery_idempotent_store_seconds_count", "", "claimed"] == 8
        # Told by the main process, in the child's place.
        assert series["celery_idempotent_outcomes_total", "die.early", "claimed"] == 1
        assert series["celery_idempotent_outcomes_total", "die.early", "abandoned"] == 1
        assert "metrics from this prefork child are not exported" not in worker.log.read_text()
        assert list(multiprocess.glob("counter_*.db"))

    @pytest.mark.parametrize("pool", ["threads", "solo", "gevent"])
    def test_a_worker_of_one_process_needs_no_directory(
        self, spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, pool: Pool
    ) -> None:
        app = open_app(spec)
        worker = start_worker(measured(spec), pool=pool)
        app.tasks["add"].delay(1, 1).get(timeout=TIMEOUT)
        wait_until(
            lambda: scrape(worker).get(("celery_idempotent_outcomes_total", "add", "completed")) == 1,
            describe=lambda: f"the completion: {scrape(worker)}",
        )

    def test_a_prefork_worker_without_one_says_what_it_needs(
        self, spec: AppSpec, open_app: OpenApp, start_worker: StartWorker
    ) -> None:
        app = open_app(spec)
        worker = start_worker(measured(spec))
        app.tasks["add"].delay(1, 1).get(timeout=TIMEOUT)
        worker.wait_for_log("metrics from this prefork child are not exported")
        worker.wait_for_log("set PROMETHEUS_MULTIPROC_DIR before starting the worker")


def test_without_the_library_the_extra_is_named(tmp_path: Path) -> None:
    """For each of the hooks that needs one; the package, and the other hooks, do without."""
    script = """
import sys
sys.modules["prometheus_client"] = sys.modules["opentelemetry.trace"] = None
from celery import Celery
from celery_idempotent import ConfigurationError, QueueLog
import celery_idempotent.contrib.log
for name in ("prometheus", "opentelemetry"):
    app = Celery("a", set_as_current=False)
    app.conf.idempotent_hooks = [f"celery_idempotent.contrib.{name}.hook"]
    try:
        QueueLog.of(app).hooks
    except ConfigurationError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "setting idempotent_hooks: 'celery_idempotent.contrib.prometheus.hook'" in first
    assert "pip install 'celery-idempotent[prometheus]'" in first
    assert "pip install 'celery-idempotent[opentelemetry]'" in second


# -- the dashboard ------------------------------------------------------------------------------------------------------------

_NAME = re.compile(r"celery_idempotent_[a-z_]+")


def queries() -> Iterator[str]:
    """Every expression of the dashboard: of panels, in rows too, of variables and annotations."""
    dashboard = json.loads((ROOT / "celery_idempotent/contrib/dashboard.json").read_text())
    panels = [inner for panel in dashboard["panels"] for inner in (panel, *panel.get("panels", ()))]
    for panel in panels:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def exposed() -> tuple[set[str], set[str], dict[str, set[str]]]:
    """Return the names of all samples, the outcomes, and the labels of each name, as the hook exposes them."""
    registry = CollectorRegistry()
    hook = PrometheusHook(registry)
    for kind in OutcomeKind:
        hook(Outcome(kind=kind, task_name="t", store=0.1, ran=0.1, age=0.1))
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return set(labels), set(OutcomeKind), labels


def test_every_series_of_the_dashboard_is_one_of_the_hooks() -> None:
    names, outcomes, labels = exposed()
    asked = list(queries())
    assert len(asked) > 10
    for query in asked:
        found = _NAME.findall(query)
        assert found, f"a query without a series of ours: {query}"
        assert set(found) <= names, query
        known = set.union(*(labels[name] for name in found)) | {"job", "instance"}
        for label, value in re.findall(r'([a-z_]+)\s*=~?\s*"([^"]*)"', query):
            assert label in known, f"no label {label} in {query}"
            if label == "outcome":
                assert set(value.split("|")) <= outcomes, query
        for grouping in re.findall(r"by \(([^)]*)\)", query):
            assert {label.strip() for label in grouping.split(",")} <= known, query


def test_every_outcome_and_every_series_of_the_hook_is_on_the_dashboard() -> None:
    names, _, _ = exposed()
    shown = {name for query in queries() for name in _NAME.findall(query)}
    families = {re.sub("_(total|bucket|count|sum|created)$", "", name) for name in names}
    assert {re.sub("_(total|bucket|count|sum)$", "", name) for name in shown} == families


def test_the_hook_on_the_default_registry_is_there_once() -> None:
    assert isinstance(prometheus.hook, PrometheusHook)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PrometheusHook()
