"""A producer whose store gives no answer: never a message without a row, never an answer that is ``None``."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from celery import Celery
from celery.result import AsyncResult

from celery_idempotent import StoreUnavailableError
from celery_idempotent.core.records import MessageKey, Status
from tests.integration.outages.conftest import LONG, SHORT
from tests.support.apps import AppSpec, OpenApp
from tests.support.proxy import Proxy
from tests.support.servers import PrivatePostgreSQL
from tests.support.waiting import wait_until


def messages_on_the_broker(app: Celery) -> int:
    return int(app.backend.client.llen(app.conf.task_default_queue))


def test_it_retries_by_the_publish_policy_and_then_raises(spec: AppSpec, open_app: OpenApp) -> None:
    with Proxy(spec.store) as proxy:
        app = open_app(replace(spec, store=proxy.url))
        proxy.close_for_now()
        before = proxy.connections

        with pytest.raises(StoreUnavailableError, match="gave no answer") as raised:
            app.tasks["echo"].apply_async((1,), message_id="m")

        assert proxy.connections - before == 1 + SHORT["max_retries"]
        assert raised.value.unsent
        proxy.reopen()
    assert messages_on_the_broker(app) == 0


@pytest.mark.parametrize(
    ("options", "attempts"),
    [({"retry": False}, 1), ({"retry_policy": {"max_retries": 1}}, 2)],
    ids=["retry=False", "retry_policy"],
)
def test_the_caller_has_a_say_in_it(
    spec: AppSpec, open_app: OpenApp, options: dict[str, object], attempts: int
) -> None:
    with Proxy(spec.store) as proxy:
        app = open_app(replace(spec, store=proxy.url))
        proxy.close_for_now()
        before = proxy.connections

        with pytest.raises(StoreUnavailableError):
            app.tasks["echo"].apply_async((1,), message_id="m", **options)

        assert proxy.connections - before == attempts
    assert messages_on_the_broker(app) == 0


def test_a_store_that_comes_back_meanwhile_is_all_it_takes(
    spec: AppSpec, open_app: OpenApp, postgresql: PrivatePostgreSQL
) -> None:
    app = open_app(replace(spec, settings={**spec.settings, "task_publish_retry_policy": LONG}))
    postgresql.stop()
    starting = threading.Timer(0.5, postgresql.start)
    starting.start()

    result = app.tasks["echo"].apply_async((1,), message_id="m")

    starting.join()
    assert isinstance(result, AsyncResult)
    assert result.duplicate is False
    assert messages_on_the_broker(app) == 1
    row = app.queue_log.store.find(MessageKey("m", "echo"))
    assert (row.status, row.task_id) == (Status.PENDING, result.id)


def test_its_own_row_is_no_duplicate_when_only_the_answer_was_lost(spec: AppSpec, open_app: OpenApp) -> None:
    with Proxy(spec.store) as proxy:
        app = open_app(
            replace(
                spec,
                store=proxy.url,
                settings={
                    **spec.settings,
                    "task_publish_retry_policy": LONG,
                    "task_annotations": {"echo": {"on_duplicate": "raise"}},
                },
            )
        )
        app.queue_log.store.check()
        proxy.swallow_answer_to(b"INSERT INTO")

        def reopen() -> None:
            proxy.swallowed.wait(30)
            proxy.reopen()

        reopening = threading.Thread(target=reopen)
        reopening.start()

        result = app.tasks["echo"].apply_async((1,), message_id="m")

        reopening.join()
        assert proxy.swallowed.is_set()
        assert result.duplicate is False
        assert messages_on_the_broker(app) == 1
        row = app.queue_log.store.find(MessageKey("m", "echo"))
        assert (row.status, row.task_id, row.duplicates) == (Status.PENDING, result.id, 0)


def test_a_connection_that_the_server_closed_costs_no_attempt(
    spec: AppSpec, open_app: OpenApp, postgresql: PrivatePostgreSQL
) -> None:
    app = open_app(replace(spec, settings={**spec.settings, "task_publish_retry": False}))
    app.tasks["echo"].apply_async((1,), message_id="m-1")

    postgresql.stop()
    with pytest.raises(StoreUnavailableError) as raised:
        app.tasks["echo"].apply_async((1,), message_id="m-2")
    assert raised.value.unsent, "it is known that nothing was written"

    postgresql.start()
    assert app.tasks["echo"].apply_async((1,), message_id="m-2").duplicate is False
    assert messages_on_the_broker(app) == 2


def test_on_duplicate_raise_asks_the_store_once(spec: AppSpec, open_app: OpenApp) -> None:
    with Proxy(spec.store) as proxy:
        app = open_app(replace(spec, store=proxy.url, settings={**spec.settings, "idempotent_on_store_error": "raise"}))
        proxy.close_for_now()
        before = proxy.connections

        with pytest.raises(StoreUnavailableError, match="gave no answer"):
            app.tasks["echo"].apply_async((1,), message_id="m")

        assert proxy.connections - before == 1
    assert messages_on_the_broker(app) == 0


def test_run_sends_unguarded_and_loudly(
    spec: AppSpec, open_app: OpenApp, postgresql: PrivatePostgreSQL, caplog: pytest.LogCaptureFixture
) -> None:
    app = open_app(replace(spec, settings={**spec.settings, "idempotent_on_store_error": "run"}))
    postgresql.stop()

    first = app.tasks["echo"].apply_async((1,), message_id="m")
    second = app.tasks["echo"].apply_async((1,), message_id="m")

    assert (first.duplicate, second.duplicate) == (False, False)
    assert messages_on_the_broker(app) == 2
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.name for record in errors] == ["celery_idempotent"] * 2
    assert all("echo[m] is sent unguarded" in record.message for record in errors)


@pytest.mark.parametrize("policy", ["retry", "raise"])
def test_hooks_see_an_eager_call(spec: AppSpec, open_app: OpenApp, postgresql: PrivatePostgreSQL, policy: str) -> None:
    app = open_app(replace(spec, settings={**spec.settings, "idempotent_on_store_error": policy}))
    postgresql.stop()

    with pytest.raises(StoreUnavailableError):
        app.tasks["echo"].apply((1,), throw=True)


def test_a_frozen_server_does_not_hang_its_caller(app: Celery, postgresql: PrivatePostgreSQL) -> None:
    app.tasks["echo"].apply_async((1,), message_id="m-1")
    answers: list[object] = []

    def call() -> None:
        try:
            answers.append(app.tasks["echo"].apply_async((1,), message_id="m-2"))
        except StoreUnavailableError as error:
            answers.append(error)

    postgresql.pause()
    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    wait_until(lambda: answers, timeout=60, describe="the caller's answer")

    assert isinstance(answers[0], StoreUnavailableError), answers
    assert not answers[0].unsent, "the server has it, and will do it when it thaws"
    assert messages_on_the_broker(app) == 1
