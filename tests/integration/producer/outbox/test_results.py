"""The result of a committed call can be read as any other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from celery import chord
from celery.result import AsyncResult
from sqlalchemy.orm import Session

from celery_idempotent import outbox
from tests.support.apps import AppSpec, OpenApp
from tests.support.effects import Effects
from tests.support.waiting import TIMEOUT
from tests.support.worker import StartWorker

pytestmark = [
    pytest.mark.parametrize("store_url", ["postgresql"], indirect=True),
    pytest.mark.parametrize("broker", ["redis", "rabbitmq-classic"], indirect=True),
]


@pytest.fixture
def effects(store_url: str) -> Iterator[Effects]:
    effects = Effects(store_url)
    yield effects
    effects.close()


@pytest.mark.parametrize("backend", ["redis", "rpc"])
def test_a_worker_answers(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, effects: Effects, backend: str
) -> None:
    if backend == "rpc":
        spec = replace(spec, backend="rpc://")
    app = open_app(spec)
    start_worker(spec)
    echo = app.tasks["echo"]
    with Session(effects.engine) as session, outbox(session):
        result = echo.delay("committed")
        again = echo.apply_async(("committed",), task_id=result.id)
        session.commit()
    with outbox():
        batch = [echo.delay(number) for number in range(3)]

    assert result.get(timeout=TIMEOUT) == "committed"
    assert (again.id, again.duplicate) == (result.id, True)
    assert [one.get(timeout=TIMEOUT) for one in batch] == [0, 1, 2]


def test_a_chord_is_as_good_as_any(
    spec: AppSpec, open_app: OpenApp, start_worker: StartWorker, effects: Effects
) -> None:
    app = open_app(spec)
    start_worker(spec)
    echo = app.tasks["echo"]
    with Session(effects.engine) as session, outbox(session):
        result: AsyncResult[object] = chord([echo.s(1), echo.s(2)], echo.s(), app=app).delay()
        session.commit()
    assert result.get(timeout=TIMEOUT) == [1, 2]
