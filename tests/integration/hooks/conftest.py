"""What the tests of hooks share: a bench whose worker, and whose app on the test's side, have a hook that notes what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import LOGS, missing
from tests.support.bench import Bench, open_bench
from tests.support.servers import NotInstalledError
from tests.support.told import HOOK, Told, telling


@dataclass
class Telling:
    """A bench, and what its hooks were told."""

    bench: Bench
    told: Told


@pytest.fixture(scope="module")
def _telling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Telling]:
    directory = Path(tmp_path_factory.mktemp("telling"))
    tasks = tuple(f"tests.support.apps.{name}" for name in ("generic", "identified", "lasting", "outcomes"))
    with telling(directory) as told:
        try:
            opened = open_bench(
                directory,
                tasks,
                settings={
                    "idempotent_hooks": ["tests.support.told.broken", HOOK],
                    "idempotent_recovery_interval": 0,
                    "idempotent_lease": 5.0,
                },
            )
            bench = opened.__enter__()
        except NotInstalledError as error:
            missing("a private server", str(error))
            raise
        try:
            yield Telling(bench, told)
        finally:
            opened.__exit__(None, None, None)


@pytest.fixture
def bench(request: pytest.FixtureRequest, _telling: Telling) -> Bench:
    """Return the bench; a test uses message ids of its own."""
    assert _telling.bench.worker is not None
    request.node.stash.setdefault(LOGS, {})["the worker"] = _telling.bench.worker.log_tail
    return _telling.bench


@pytest.fixture
def told(_telling: Telling) -> Told:
    """Return what the hooks of the bench were told."""
    return _telling.told
