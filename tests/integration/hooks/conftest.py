"""What the tests of hooks share: a shared worker whose worker, and whose app on the test's side, have a hook that notes what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import LOGS, missing
from tests.support.hook_recorder import HOOK, HookRecorder, recording_hooks
from tests.support.servers import NotInstalledError
from tests.support.shared_workers import SharedWorker, open_shared_worker


@dataclass
class WorkerWithHooks:
    """A shared worker, and what its hooks were told."""

    shared_worker: SharedWorker
    hook_recorder: HookRecorder


@pytest.fixture(scope="module")
def _worker_with_hooks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerWithHooks]:
    directory = Path(tmp_path_factory.mktemp("telling"))
    tasks = tuple(f"tests.support.apps.{name}" for name in ("generic", "identified", "lasting", "outcomes"))
    with recording_hooks(directory) as hook_recorder:
        try:
            opened = open_shared_worker(
                directory,
                tasks,
                settings={
                    "idempotent_hooks": ["tests.support.hook_recorder.broken", HOOK],
                    "idempotent_recovery_interval": 0,
                    "idempotent_lease": 5.0,
                },
            )
            shared_worker = opened.__enter__()
        except NotInstalledError as error:
            missing("a private server", str(error))
            raise
        try:
            yield WorkerWithHooks(shared_worker, hook_recorder)
        finally:
            opened.__exit__(None, None, None)


@pytest.fixture
def shared_worker(request: pytest.FixtureRequest, _worker_with_hooks: WorkerWithHooks) -> SharedWorker:
    """Return the shared worker; a test uses message ids of its own."""
    assert _worker_with_hooks.shared_worker.worker is not None
    request.node.stash.setdefault(LOGS, {})["the worker"] = _worker_with_hooks.shared_worker.worker.log_tail
    return _worker_with_hooks.shared_worker


@pytest.fixture
def hook_recorder(_worker_with_hooks: WorkerWithHooks) -> HookRecorder:
    """Return what the hooks of the shared worker were told."""
    return _worker_with_hooks.hook_recorder
