"""An eager call outside of tests: a warning where its row stays, and a line in the log for what was skipped."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_idempotent import EagerStoreWarning, IdempotentTask, QueueLog
from celery_idempotent.stores.redis import RedisStore
from tests.support.apps.spec import close_app

MakeApp = Callable[..., Celery]


@pytest.fixture
def make_app() -> Iterator[MakeApp]:
    """Make apps with a task, ``echo``."""
    apps: list[Celery] = []

    def make_app(store: str, **settings: Any) -> Celery:
        app = Celery("eager", broker="memory://", backend="cache+memory://", set_as_current=False)
        app.conf.update(idempotent_store=store, **settings)
        app.task(_echo, base=IdempotentTask, name="echo", message_id="echo:{value}", shared=False)
        apps.append(app)
        return app

    yield make_app
    for app in apps:
        close_app(app)


def _echo(value: str) -> str:
    return value


@pytest.mark.parametrize("eager", [True, False], ids=["task_always_eager", "apply"])
def test_a_file_warns_once_for_each_app(
    make_app: MakeApp, tmp_path: Path, caplog: pytest.LogCaptureFixture, eager: bool
) -> None:
    for _ in range(2):
        task = make_app(f"sqlite:///{tmp_path / 'log.db'}", task_always_eager=eager).tasks["echo"]
        caplog.clear()
        with pytest.warns(EagerStoreWarning, match=r"SQLStore\('sqlite:///.*log.db'") as warned:
            _ = [task.delay(value) if eager else task.apply((value,)) for value in ("a", "b")]
        assert len(warned) == 1
        assert [record.levelname for record in caplog.records if "is called eagerly" in record.message] == ["WARNING"]


def test_a_redis_warns(make_app: MakeApp, redis_url: str) -> None:
    with pytest.warns(EagerStoreWarning, match="RedisStore"):
        make_app(redis_url, task_always_eager=True, idempotent_table="test_eager_store").tasks["echo"].delay("a")


def test_what_does_not_stay_does_not_warn(make_app: MakeApp, tmp_path: Path) -> None:
    app, unguarded = make_app("sqlite://", task_always_eager=True), make_app(f"sqlite:///{tmp_path / 'log.db'}")
    unguarded.conf.update(task_always_eager=True, idempotent_enabled=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert app.tasks["echo"].delay("a").get() == unguarded.tasks["echo"].delay("a").get() == "a"


def test_a_store_of_ones_own_warns_unless_it_says_no(make_app: MakeApp) -> None:
    class Temporary(RedisStore):
        lasting = False

    app = make_app("sqlite://")
    QueueLog(app, store=Temporary("redis://nowhere.invalid"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QueueLog.of(app).warn_of_eager_call()


@pytest.mark.parametrize("how", ["eager", "apply", "sent"])
def test_a_skipped_call_is_logged_with_its_ids(make_app: MakeApp, caplog: pytest.LogCaptureFixture, how: str) -> None:
    caplog.set_level(logging.INFO, logger="celery_idempotent")
    task = make_app("sqlite://", task_always_eager=how == "eager").tasks["echo"]
    first = task.apply(("a",), task_id="one") if how == "apply" else task.apply_async(("a",), task_id="one")
    caplog.clear()
    again = task.apply(("a",), task_id="two") if how == "apply" else task.apply_async(("a",), task_id="two")
    assert (first.duplicate, again.duplicate) == (False, True)
    (record,) = (record for record in caplog.records if record.name == "celery_idempotent")
    status = "pending" if how == "sent" else "done"
    assert (record.levelname, record.getMessage()) == (
        "INFO",
        f"echo[echo:a] is skipped, as a call under two: it was sent before as one, and is {status}",
    )
