"""What a worker checks before it starts."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.pool import Pool
from celery import Celery

from celery_idempotent import ConfigurationError, IdempotentTask
from celery_idempotent.worker.bootsteps import CheckStep, RecoveryStep


def parent(**settings: Any) -> SimpleNamespace:
    app = Celery("start", broker="memory://", set_as_current=False)
    app.conf.update(**settings)

    @app.task(base=IdempotentTask, shared=False)
    def charge() -> None: ...

    app.finalize()
    return SimpleNamespace(app=app, pool_cls=Pool)


def include(worker: SimpleNamespace) -> None:
    try:
        CheckStep.__new__(CheckStep).include_if(worker)
    finally:
        worker.app.close()


def test_with_the_guard_off_it_starts_whatever_the_store_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        include(parent(idempotent_enabled=False, idempotent_store="nonsense://"))
    off, store = caplog.messages
    assert off.startswith("the guard is off for all tasks, since idempotent_enabled is False")
    assert store.startswith("the worker starts although it could not guard its tasks")


def test_with_the_guard_on_it_does_not() -> None:
    with pytest.raises(ConfigurationError, match="nonsense"):
        include(parent(idempotent_store="nonsense://"))


@pytest.mark.parametrize(("interval", "enabled", "runs"), [(30, True, True), (0, True, False), (0, False, True)])
def test_recovery_runs_without_an_interval_only_while_the_guard_is_off(
    interval: int, enabled: bool, runs: bool
) -> None:
    worker = parent(idempotent_enabled=enabled, idempotent_recovery_interval=interval)
    assert RecoveryStep.__new__(RecoveryStep).include_if(worker) is runs
    worker.app.close()
