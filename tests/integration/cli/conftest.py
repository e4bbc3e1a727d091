"""Commands run in this process, on the shared worker's app."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.bin.celery import celery

from tests.support.shared_workers import SharedWorker

__all__ = ["Command"]

Command = Callable[..., tuple[int, Any]]


@pytest.fixture
def command(shared_worker: SharedWorker, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``celery idempotent COMMAND --json``; its exit status, and what it printed."""

    def command(*arguments: str, app: Celery | None = None) -> tuple[int, Any]:
        capsys.readouterr()
        # As `app.start` does it, which keeps the status to itself.
        celery.params[0].default = app or shared_worker.app
        try:
            status = celery.main(["idempotent", *arguments, "--json"], standalone_mode=False)
        finally:
            celery.params[0].default = None
        return status or 0, json.loads(capsys.readouterr().out)

    return command
