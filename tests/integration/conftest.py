"""What the integration tests share: one shared worker per test process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import attach_log
from tests.support.servers import skip_if_not_installed
from tests.support.shared_workers import SharedWorker, open_shared_worker

#: Modules of the tasks that the shared worker runs.
TASKS = (
    "tests.support.apps.children",
    "tests.support.apps.flaky",
    "tests.support.apps.generic",
    "tests.support.apps.handlers",
    "tests.support.apps.modelled",
    "tests.support.apps.identified",
    "tests.support.apps.outcomes",
    "tests.support.apps.stepping",
    "tests.support.apps.subclasses",
)


@pytest.fixture(scope="session")
def session_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedWorker]:
    """Yield the shared worker of this test process, with a prefork worker on Redis and SQLite; tests ask for ``shared_worker``."""
    with (
        skip_if_not_installed(),
        open_shared_worker(
            Path(tmp_path_factory.mktemp("shared_worker")),
            TASKS,
            # Its tests make claims that ran out, and look at what deliveries make of them.
            settings={"idempotent_recovery_interval": 0},
        ) as shared_worker,
    ):
        yield shared_worker


@pytest.fixture
def shared_worker(request: pytest.FixtureRequest, session_worker: SharedWorker) -> SharedWorker:
    """Return the shared worker, shared with other tests: a test uses message ids of its own, and leaves nothing waiting in the worker."""
    assert session_worker.worker.is_alive, f"an earlier test broke the worker:\n{session_worker.worker.log_tail()}"
    attach_log(request, "the shared worker", session_worker.worker.log_tail)
    return session_worker
