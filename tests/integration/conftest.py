"""What the integration tests share: one bench per test process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LOGS, missing
from tests.support.bench import Bench, open_bench
from tests.support.servers import NotInstalledError

#: Modules of the tasks that the shared worker runs.
TASKS = (
    "tests.support.apps.children",
    "tests.support.apps.flaky",
    "tests.support.apps.generic",
    "tests.support.apps.handlers",
    "tests.support.apps.modelled",
    "tests.support.apps.identified",
    "tests.support.apps.outcomes",
    "tests.support.apps.subclasses",
)


@pytest.fixture(scope="session")
def shared_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Yield the bench of this test process, with a prefork worker on Redis and SQLite; tests ask for ``bench``."""
    try:
        opened = open_bench(
            Path(tmp_path_factory.mktemp("bench")),
            TASKS,
            # Its tests make claims that ran out, and look at what deliveries make of them.
            settings={"idempotent_recovery_interval": 0},
        )
        bench = opened.__enter__()
    except NotInstalledError as error:
        missing("a private server", str(error))
        raise
    try:
        yield bench
    finally:
        opened.__exit__(None, None, None)


@pytest.fixture
def bench(request: pytest.FixtureRequest, shared_bench: Bench) -> Bench:
    """Return the bench, shared with other tests: a test uses message ids of its own, and leaves nothing waiting in the worker."""
    assert shared_bench.worker is not None
    assert shared_bench.worker.is_alive, f"an earlier test broke the worker:\n{shared_bench.worker.log_tail()}"
    request.node.stash.setdefault(LOGS, {})["the shared worker"] = shared_bench.worker.log_tail
    return shared_bench
