"""Which entries of beat have one message id for all ticks."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.beat import BeatLazyFunc
from celery.schedules import crontab

from celery_idempotent import IdempotentTask, by_arguments
from celery_idempotent.doctor.beat_entries import read_fixed_entries
from celery_idempotent.doctor.facts import EntryFacts


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("shop", broker="memory://", set_as_current=False)
    tasks: dict[str, dict[str, Any]] = {
        "by.task": {},
        "by.format": {"message_id": "user:{user}", "unique_for": 60},
        "by.arguments": {"message_id": by_arguments()},
        "by.chance": {"message_id": lambda **_: str(uuid.uuid4())},
        "off": {"message_id": "user:{user}", "idempotent": False},
    }
    for name, options in tasks.items():
        app.task(base=IdempotentTask, name=name, shared=False, **options)(body)
    app.task(name="plain", shared=False)(body)
    app.finalize()
    yield app
    app.close()


def body(user: int) -> int:
    return user


def read(app: Celery, task: str, **entry: Any) -> list[EntryFacts]:
    app.conf.beat_schedule = {"entry": {"task": task, "schedule": 600, "kwargs": {"user": 7}, **entry}}
    return list(read_fixed_entries(app))


def test_an_id_in_the_entrys_options_is_fixed(app: Celery) -> None:
    (found,) = read(app, "by.task", options={"message_id": "nightly"})
    assert found == EntryFacts("entry", "by.task", "nightly", interval=600.0)
    assert found.stays_taken


def test_a_celery_id_in_the_entrys_options_is_fixed_too(app: Celery) -> None:
    assert [found.message_id for found in read(app, "by.task", options={"task_id": "t"})] == ["t"]


def test_a_tasks_own_id_of_the_same_arguments_is_fixed(app: Celery) -> None:
    (found,) = read(app, "by.format")
    assert found == EntryFacts("entry", "by.format", "user:7", interval=600.0, unique_for=60.0)
    assert not found.stays_taken
    assert len(read(app, "by.arguments")) == 1


@pytest.mark.parametrize("task", ["by.task", "by.chance", "off", "plain", "unknown"])
def test_other_ids_are_not(app: Celery, task: str) -> None:
    assert read(app, task) == []


def test_arguments_that_do_not_fit_make_no_id(app: Celery) -> None:
    assert read(app, "by.format", kwargs={"nobody": 7}) == []


def test_arguments_that_are_made_at_each_tick_are_not_fixed(app: Celery) -> None:
    assert read(app, "by.format", kwargs={"user": BeatLazyFunc(lambda: 1)}) == []


@pytest.mark.parametrize(("schedule", "interval"), [(crontab(minute="*/10"), 600.0), (crontab(minute=0), 3600.0)])
def test_the_interval_of_a_crontab_is_from_tick_to_tick(app: Celery, schedule: crontab, interval: float) -> None:
    (found,) = read(app, "by.format", schedule=schedule)
    assert found.interval == pytest.approx(interval, abs=1)
