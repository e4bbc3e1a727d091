"""Hooks: how an app names them, what becomes of those that cannot be had, and that none disturbs a task."""

from __future__ import annotations

import logging
from dataclasses import FrozenInstanceError, fields
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from celery_idempotent import ConfigurationError, IdempotentTask, QueueLog
from celery_idempotent.core.records import MessageKey, ProcessedStatus, Row, Status
from celery_idempotent.hooks import Hooks, Outcome, OutcomeKind, reason_of
from celery_idempotent.message.serialization import decode_result, encode_message, encode_result, trace_of

KEY = MessageKey("m", "task")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class NotAHook:
    def __call__(self, outcome: Outcome) -> None: ...


def row(**changes: Any) -> Row:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    values: dict[str, Any] = dict.fromkeys(name.name for name in fields(Row))
    values |= {
        "key": KEY,
        "status": Status.DONE,
        "processed_status": ProcessedStatus.SUCCESS,
        "created_timestamp": now - timedelta(seconds=90),
        "read_at": now,
        "task_id": "first",
        "takeovers": 0,
    }
    return Row(**(values | changes))


class TestTheSetting:
    def test_without_hooks_no_outcome_is_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        outcomes = QueueLog.of(Celery("hooks", set_as_current=False)).hooks
        monkeypatch.delattr("celery_idempotent.hooks.Outcome")

        outcomes.emit(OutcomeKind.RECORDED, KEY)

        assert outcomes.traceparent() is None

    @pytest.mark.parametrize("path", ["tests.support.hook_recorder.broken", "tests.support.hook_recorder:broken"])
    def test_a_path_and_a_callable_are_called(self, path: str, caplog: pytest.LogCaptureFixture) -> None:
        received: list[Outcome] = []
        outcomes = Hooks.of([path, received.append])
        assert outcomes is not None
        outcomes.emit(OutcomeKind.CLAIMED, KEY)
        assert [outcome.kind for outcome in received] == ["claimed"]
        assert "no claimed, thank you" in caplog.text

    @pytest.mark.parametrize(
        ("hooks", "says"),
        [
            ("celery_idempotent.contrib.logging.hook", "must be a list"),
            (len, "must be a list"),
            ([7], "7 is neither a callable of one outcome nor the dotted path of one"),
            ([NotAHook], "is neither"),
            (["hook"], "'hook' is not the path of a hook, such as"),
            (["there.is.none"], "'there.is.none' cannot be imported: No module named 'there'"),
            (["celery_idempotent.hooks.hok"], "'celery_idempotent.hooks.hok': the module has no such name"),
            (["celery_idempotent.hooks.SETTING"], "which is not a callable that takes one outcome"),
            (["celery_idempotent.hooks.Outcome"], "which is not a callable that takes one outcome"),
        ],
    )
    def test_an_invalid_hook_is_refused_by_name_before_anything_is_sent(self, hooks: Any, says: str) -> None:
        app = Celery("hooks", broker="memory://", set_as_current=False)
        app.conf.update(idempotent_hooks=hooks, idempotent_store="sqlite://")

        @app.task(base=IdempotentTask, shared=False)
        def task() -> None: ...

        with pytest.raises(ConfigurationError, match="setting idempotent_hooks") as refused:
            task.delay()
        assert says in str(refused.value)


class TestTelling:
    def test_a_record_is_frozen_and_says_what_the_row_says(self) -> None:
        received: list[Outcome] = []
        message = encode_message((1,), {}, {}, serializer="json", trace=TRACE)
        Hooks([received.append]).emit(OutcomeKind.DUPLICATE, KEY, row=row(message=message), task_id="second")

        (outcome,) = received
        assert (outcome.task_name, outcome.message_id, outcome.task_id) == ("task", "m", "second")
        assert (outcome.first_task_id, outcome.status, outcome.age) == ("first", "done", 90.0)
        assert outcome.trace == TRACE
        with pytest.raises(FrozenInstanceError):
            outcome.count = 2  # type: ignore[misc]

    def test_a_failing_hook_is_logged_once_and_others_still_run(self, caplog: pytest.LogCaptureFixture) -> None:
        received: list[Outcome] = []

        def broken(outcome: Outcome) -> None:
            received.append(outcome)
            raise LookupError("the registry is gone")

        outcomes = Hooks([broken, received.append])
        with caplog.at_level(logging.ERROR, "celery_idempotent"):
            for _ in range(3):
                outcomes.emit(OutcomeKind.CLAIMED, KEY)

        assert len(received) == 6
        (record,) = caplog.records
        assert record.exc_info is not None
        assert "broken" in record.getMessage()

    def test_a_hook_that_cannot_be_hashed_may_raise_too(self, caplog: pytest.LogCaptureFixture) -> None:
        class Broken(list[Any]):
            def __call__(self, outcome: Outcome) -> None:
                raise LookupError

        Hooks([Broken()]).emit(OutcomeKind.CLAIMED, KEY)
        assert len(caplog.records) == 1

    @pytest.mark.parametrize("kind", [OutcomeKind.CLAIMED, OutcomeKind.RECORDED, OutcomeKind.RETRIED])
    def test_a_time_limit_in_a_hook_reaches_a_running_body(self, kind: OutcomeKind) -> None:
        def slow(outcome: Outcome) -> None:
            raise SoftTimeLimitExceeded(1)

        with pytest.raises(SoftTimeLimitExceeded):
            Hooks([slow]).emit(kind, KEY)

    @pytest.mark.parametrize("kind", [OutcomeKind.COMPLETED, OutcomeKind.FAILED, OutcomeKind.SKIPPED])
    def test_but_comes_too_late_for_one_that_has_ended(self, kind: OutcomeKind) -> None:
        def slow(outcome: Outcome) -> None:
            raise SoftTimeLimitExceeded(1)

        Hooks([slow]).emit(kind, KEY)

    def test_the_first_hook_that_traces_is_asked_for_the_span(self, caplog: pytest.LogCaptureFixture) -> None:
        class Tracing:
            def __call__(self, outcome: Outcome) -> None: ...

            def traceparent(self) -> str | None:
                return TRACE

        class Broken(Tracing):
            def traceparent(self) -> str | None:
                raise LookupError

        assert Hooks([print]).traceparent() is None
        assert Hooks([print, Tracing()]).traceparent() == TRACE
        broken = Hooks([Broken()])
        assert [broken.traceparent(), broken.traceparent()] == [None, None]
        assert len(caplog.records) == 1


class TestTraces:
    def test_a_trace_is_read_beside_what_it_was_encoded_with(self) -> None:
        app = Celery("hooks", set_as_current=False)
        data = encode_result(app, None, trace=TRACE)
        assert data is not None
        assert (trace_of(data), decode_result(app, data)) == (TRACE, None)

    @pytest.mark.parametrize("data", [None, b"", b"application/json;utf-8\n{}", b"\n", b"application/json\n;;"])
    def test_a_message_without_a_trace_has_none(self, data: bytes | None) -> None:
        assert trace_of(data) is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("ValueError: no such card: 4711", "ValueError"),
        ("abandoned: the worker that ran it died or lost its lease", "abandoned"),
        ("revoked", "revoked"),
        ("shop.Odd, whose text raises KeyError", "shop.Odd"),
    ],
)
def test_the_reason_of_an_error_is_its_first_word(error: str, reason: str) -> None:
    assert reason_of(error) == reason
