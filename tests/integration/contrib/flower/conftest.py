"""A Flower on a shared worker with real traffic, and a browser that looks at it: one of each for all tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome

from tests.conftest import attach_log
from tests.support.browser import open_browser
from tests.support.flower import FlowerProcess
from tests.support.servers import skip_if_not_installed
from tests.support.shared_workers import SharedWorker, open_shared_worker
from tests.support.waiting import wait_until

#: Who may change things in the shared Flower.
OPERATOR = "operator:secret"

TASKS = (
    "tests.support.apps.flaky",
    "tests.support.apps.generic",
    "tests.support.apps.outcomes",
    "tests.support.apps.scenarios",
)


@pytest.fixture(scope="session")
def worker_with_events(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedWorker]:
    """Yield a shared worker whose worker sends events."""
    directory = Path(tmp_path_factory.mktemp("watched"))
    # Its tests make claims that ran out, and look at what is said of them.
    settings = {"idempotent_recovery_interval": 0, "worker_send_task_events": True}
    with (
        skip_if_not_installed(),
        open_shared_worker(directory, TASKS, settings=settings, concurrency=4) as shared_worker,
    ):
        yield shared_worker


@pytest.fixture(scope="session")
def shared_flower(worker_with_events: SharedWorker) -> Iterator[FlowerProcess]:
    """Flower with basic authentication."""
    with FlowerProcess(
        worker_with_events.ledger.path.parent, worker_with_events.spec, f"--basic_auth={OPERATOR}"
    ) as flower:
        wait_until_it_hears(flower, worker_with_events)
        yield flower


@pytest.fixture
def shared_worker(worker_with_events: SharedWorker) -> SharedWorker:
    """Return the shared worker; a test uses message ids of its own."""
    return worker_with_events


@pytest.fixture
def flower(
    request: pytest.FixtureRequest, worker_with_events: SharedWorker, shared_flower: FlowerProcess
) -> FlowerProcess:
    """Return the Flower that all tests look at."""
    attach_log(request, "Flower", shared_flower.log_tail)
    attach_log(request, "the worker", worker_with_events.worker.log_tail)
    return shared_flower


@pytest.fixture(scope="session")
def shared_browser() -> Iterator[Chrome]:
    """Yield a Chromium."""
    with skip_if_not_installed("a browser"), open_browser() as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Chrome) -> Chrome:
    """Return the Chromium, on an empty page."""
    shared_browser.get("about:blank")
    return shared_browser


def wait_until_it_hears(flower: FlowerProcess, shared_worker: SharedWorker) -> None:
    """Wait until Flower has heard of the worker, so that it misses no event; from its first request for ``/metrics`` it notes ours."""
    online = f'flower_worker_online{{worker="{shared_worker.worker.hostname}"}} 1.0'
    wait_until(lambda: online in flower.get("/metrics").text, timeout=60.0, describe=flower.log_tail)


def info_of(flower: FlowerProcess, task_id: str) -> dict[str, Any]:
    """Return what Flower knows of a task; nothing before it has heard of it."""
    answer = flower.get(f"/api/task/info/{task_id}", credentials=OPERATOR)
    return json.loads(answer.text) if answer.status == 200 else {}


def wait_for_state(flower: FlowerProcess, task_id: str, state: str) -> dict[str, Any]:
    """Wait for a task to have a state; return what Flower knows of it."""
    return wait_until(
        lambda: info if (info := info_of(flower, task_id)).get("state") == state else None,
        timeout=30.0,
        describe=lambda: f"{state} of {task_id}: {info_of(flower, task_id)}",
    )


def value_of(flower: FlowerProcess, series: str) -> float:
    """Return the value of a series of Flower's ``/metrics``; 0 before there is one."""
    for line in flower.get("/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        if name == series:
            return float(value)
    return 0.0
