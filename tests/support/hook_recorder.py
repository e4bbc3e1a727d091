"""A hook that notes each outcome in a file, from all processes of an app.

The file is named by an environment variable, so that a worker which is started meanwhile writes to it too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from celery_idempotent.hooks import Outcome
from tests.support.waiting import wait_until

__all__ = ["HOOK", "HookRecorder", "broken", "note", "recording_hooks"]

HOOK = "tests.support.hook_recorder.note"

_VARIABLE = "CELERY_IDEMPOTENT_TEST_RECORDED_HOOKS"


def note(outcome: Outcome) -> None:
    """Note an outcome, as the hook: one line, in one write."""
    line = json.dumps({**asdict(outcome), "pid": os.getpid()}).encode() + b"\n"
    descriptor = os.open(os.environ[_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def broken(outcome: Outcome) -> None:
    """Raise on every outcome."""
    raise RuntimeError(f"no {outcome.kind}, thank you")


class HookRecorder:
    """Reads what was noted."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, message_id: str | None) -> list[dict[str, Any]]:
        """Return the outcomes of a message; for ``None``, those without one."""
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().splitlines(keepends=True)
        notes = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return [told for told in notes if told["message_id"] == message_id]

    def kinds(self, message_id: str) -> list[str]:
        """Return the kinds of a message's outcomes, in order."""
        return [told["kind"] for told in self(message_id)]

    def wait(self, message_id: str | None, kind: str, *, count: int = 1, timeout: float = 60.0) -> dict[str, Any]:
        """Wait for so many outcomes of a kind; return the last one."""

        def told() -> list[dict[str, Any]] | None:
            found = [told for told in self(message_id) if told["kind"] == kind]
            return found if len(found) >= count else None

        found = wait_until(
            told, timeout=timeout, describe=lambda: f"{count} times {kind!r} of {message_id}: {self(message_id)}"
        )
        return found[-1]


@contextmanager
def recording_hooks(directory: Path) -> Iterator[HookRecorder]:
    """Have this process, and those that it starts meanwhile, note in a file of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        path = directory / "told.jsonl"
        patch.setenv(_VARIABLE, str(path))
        yield HookRecorder(path)
