from __future__ import annotations

from datetime import UTC, datetime

import pytest
from celery import Celery

from celery_idempotent.worker.celery_versions import dated

OPTIONS = {"expires": "2026-11-29T01:00:00+00:00", "eta": None, "queue": "gpu"}


@pytest.mark.parametrize("protocol", [1, 2])
def test_only_the_first_protocol_needs_moments(protocol: int) -> None:
    """Celery before 5.7 calls ``isoformat`` of a text there, so a message with an expiry was never published again."""
    app = Celery(set_as_current=False)
    app.conf.task_protocol = protocol

    @app.task(shared=False)
    def task() -> None: ...

    changed = {**OPTIONS, "expires": datetime(2026, 11, 29, 1, tzinfo=UTC)}
    assert dated(task, OPTIONS) == (changed if protocol == 1 else OPTIONS)
