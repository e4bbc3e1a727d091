"""A pytest plugin for Celery's own tests: IdempotentTask is the base of every task, with a store for each test, or for one worker.

Celery's tests give their tasks ids such as ``"foo"`` again and again; a store of its own keeps one test from being taken for another's duplicate. The
integration tests share one worker, and so one store; they use fresh ids.
"""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path

import celery
import pytest

from celery_idempotent import IdempotentTask
from celery_idempotent.settings import Settings
from celery_idempotent.worker import lease_renewal

celery.Celery.task_cls = "celery_idempotent.task:IdempotentTask"
celery.Task = IdempotentTask  # for tasks that are classes

_DIRECTORY = Path(os.environ["CELERY_SUITE_STORES"])
_numbers = itertools.count()


def _anew() -> None:
    Settings.store = f"sqlite:///{_DIRECTORY}/{os.getpid()}-{next(_numbers)}.db"


_anew()


@pytest.fixture(autouse=True)
def store_of_its_own(request: pytest.FixtureRequest) -> None:
    """Give each unit test a new store."""
    if "integration" not in request.path.parts:
        _anew()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """End the thread that renews leases: each of Celery's unit tests looks for threads that it has left.

    It rests for half a minute first. Where a test replaces what ends a run, it would go on with what that one holds.
    """
    if "integration" in item.path.parts:
        return
    for renewal in list(lease_renewal._to_give_up):
        for held in renewal.held():
            renewal.let_go(held.holder)
        renewal.rest()
    for thread in threading.enumerate():
        if thread.name == "celery-idempotent-renewal":
            thread.join(10)
