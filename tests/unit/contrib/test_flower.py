"""The parts of Flower's page that need no Flower: alarms, times, and the copies that were heard of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from celery_idempotent.contrib.flower.alarms import alarms, is_abandoned
from celery_idempotent.contrib.flower.duplicates import latest_duplicates
from celery_idempotent.contrib.flower.event_log import EventLog
from celery_idempotent.contrib.flower.snapshot import Glance, legible
from celery_idempotent.contrib.flower.times import ago, span
from celery_idempotent.core.records import LogHealth, MessageKey, ProcessedStatus, Row, Status
from celery_idempotent.settings import Settings

NOW = datetime(2026, 11, 25, 3, 0, tzinfo=UTC)
KEY = MessageKey("order:1", "charge")

ROW = Row(
    key=KEY,
    status=Status.PENDING,
    processed_status=None,
    created_timestamp=NOW - timedelta(hours=3),
    processed_timestamp=None,
    task_id="id",
    queue="money",
    fingerprint=None,
    attempt=0,
    token=1,
    worker="w@here:1",
    lease_expires_at=None,
    available_at=None,
    published_at=None,
    expires_at=None,
    duplicates=0,
    message=None,
    result=None,
    error=None,
    read_at=NOW,
)


def before(**span_: float) -> datetime:
    return NOW - timedelta(**span_)


def failed(when: datetime, error: str = "ValueError: no such card", message_id: str = "order:1") -> Row:
    return replace(
        ROW,
        key=MessageKey(message_id, "charge"),
        status=Status.DONE,
        processed_status=ProcessedStatus.FAILURE,
        processed_timestamp=when,
        error=error,
    )


# -- alarms -----------------------------------------------------------------------------------------------------------------


def told(
    health: LogHealth | None = None, *, rows: Sequence[Row] = (), waiting: Sequence[Row] = (), **glance: Any
) -> list[tuple[str, str]]:
    seen = Glance(health or LogHealth(NOW), **glance)
    return [(alarm.level, alarm.what) for alarm in alarms(seen, rows, waiting, Settings())]


def test_a_healthy_log_raises_no_alarm() -> None:
    assert told(rows=[failed(before(hours=2))], waiting=[replace(ROW, created_timestamp=before(seconds=299))]) == []
    assert told(LogHealth(NOW, lapsed_since=before(seconds=4), unsent_since=before(seconds=4))) == []


@pytest.mark.parametrize(
    ("since", "level"),
    [(before(seconds=6), "warning"), (before(seconds=149), "warning"), (before(seconds=151), "danger")],
)
def test_overdue_messages_are_a_danger_after_five_passes(since: datetime, level: str) -> None:
    assert told(LogHealth(NOW, lapsed_since=since), lapsed=(ROW,)) == [
        (level, "1 message whose worker died is not taken over")
    ]
    assert told(LogHealth(NOW, unsent_since=since), unsent=(ROW, ROW)) == [
        (level, "2 messages are recorded and not handed to the broker")
    ]


def test_new_failures_are_a_danger_and_old_ones_a_warning() -> None:
    assert told(rows=[failed(before(minutes=14))]) == [("danger", "1 message has failed within the last hour")]
    assert told(rows=[failed(before(minutes=16)), failed(before(minutes=59)), failed(before(minutes=61))]) == [
        ("warning", "2 messages have failed within the last hour")
    ]


def test_a_guard_that_is_off_is_an_alarm() -> None:
    (alarm,) = alarms(Glance(LogHealth(NOW)), (), (), Settings(enabled=False))
    assert (alarm.level, alarm.what) == ("danger", "The guard is off: idempotent_enabled is False")


def test_failures_are_counted_by_kind() -> None:
    rows = [
        failed(before(minutes=1)),
        failed(before(minutes=2), "shop.errors.DeclinedError: no"),
        failed(before(minutes=3)),
        failed(before(minutes=4), "abandoned: the worker that ran it died or lost its lease"),
    ]

    (alarm,) = alarms(Glance(LogHealth(NOW)), rows, (), Settings())

    assert alarm.remedy == "2 ValueError, 1 DeclinedError, 1 abandoned"
    assert alarm.since == before(minutes=1)
    assert [is_abandoned(row) for row in rows] == [False, False, False, True]


def test_a_backlog_names_its_oldest_message_and_comes_last() -> None:
    late = replace(ROW, created_timestamp=before(minutes=6))

    assert told(waiting=[ROW, late], rows=[failed(before(minutes=1))]) == [
        ("danger", "1 message has failed within the last hour"),
        ("warning", "The oldest message that is due waits on queue money"),
    ]


# -- times ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (89, "1 min 29 s"),
        (725, "12 min"),
        (3600, "1 h"),
        (11_160, "3 h 6 min"),
        (90_000, "1 d 1 h"),
        (40 * 86_400 + 7200, "40 d"),
    ],
)
def test_a_duration_is_shown_in_its_largest_units(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_a_time_is_shown_relative_and_exact() -> None:
    moment = datetime(2026, 11, 25, 3, 57, tzinfo=UTC).astimezone()

    assert ago(moment, NOW) == (
        '<time datetime="2026-11-25T03:57:00+00:00" title="2026-11-25 03:57:00 UTC">in 57 min</time>'
    )
    assert ">3 min ago<" in ago(before(minutes=3).timestamp(), NOW)
    assert ">now<" in ago(NOW, NOW)
    assert "&ndash;" in ago(None, NOW)


# -- copies -----------------------------------------------------------------------------------------------------------------


def event(type_: str, uuid: str = "id", **fields: Any) -> dict[str, Any]:
    known = {"message_id": "order:1", "name": "charge", "hostname": "w@here", "timestamp": time.time()}
    return {"type": type_, "uuid": uuid, **known, **fields}


@pytest.fixture
def event_log() -> EventLog:
    return EventLog()


def test_a_copy_that_is_held_again_and_again_is_one(event_log: EventLog) -> None:
    now = time.time()
    for number in range(3):
        event_log.note(event("idempotent-held", timestamp=now - 10 + number, countdown=2.0 * number))

    (copy,) = event_log.held()

    assert (copy.key, copy.times, copy.since, copy.at, copy.countdown) == (KEY, 3, now - 10, now - 8, 4.0)


@pytest.mark.parametrize("end", ["task-succeeded", "task-failed", "task-revoked", "task-skipped"])
def test_it_is_held_until_it_ends(event_log: EventLog, end: str) -> None:
    event_log.note(event("task-held", "copy", countdown=5.0))
    event_log.note(event("task-started", "copy"))
    assert [copy.task_id for copy in event_log.held()] == ["copy"]

    event_log.note(event(end, "copy"))

    assert event_log.held() == []


def test_one_that_did_not_come_again_is_not_held_for_ever(event_log: EventLog) -> None:
    event_log.note(event("task-held", timestamp=time.time() - 70, countdown=5.0))

    assert event_log.held() == []


def test_only_so_many_are_kept(event_log: EventLog) -> None:
    for number in range(1500):
        event_log.note(event("task-skipped", f"id {number}"))

    skipped = event_log.skipped()

    assert len(skipped) == 1000
    assert skipped[0].task_id == "id 1499"


def test_it_listens_to_a_state_once_and_passes_everything_on(event_log: EventLog) -> None:
    passed_on: list[Any] = []
    state = SimpleNamespace(event=passed_on.append)

    event_log.listen(state)
    event_log.listen(state)
    skipped = event("task-skipped")
    state.event(skipped)

    assert passed_on == [skipped]
    assert len(event_log.of(KEY)) == 1


def test_duplicates_come_from_rows_and_events_latest_first(event_log: EventLog) -> None:
    rows = (
        replace(ROW, duplicates=2, processed_timestamp=before(days=1)),
        replace(ROW, key=MessageKey("order:2", "charge"), duplicates=1, processed_timestamp=before(days=2)),
        replace(ROW, key=MessageKey("order:3", "charge"), duplicates=0),
    )
    event_log.note(event("task-skipped", message_id="order:2", timestamp=NOW.timestamp()))
    event_log.note(event("task-skipped", "other", message_id="order:9", timestamp=before(hours=30).timestamp()))

    found = latest_duplicates(Glance(LogHealth(NOW), latest=rows), event_log)

    assert [(each.key.message_id, each.row is not None, each.copy is not None) for each in found] == [
        ("order:2", True, True),
        ("order:1", True, False),
        ("order:9", False, True),
    ]


# -- what is sent and kept by who means ill ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"uuid": "a\udcff"},
        {"uuid": {"a": 1}},
        {"message_id": "m\udcff"},
        {"message_id": None},
        {"name": ["t"]},
        {"hostname": "h\udcff"},
        {"timestamp": "now"},
        {"timestamp": 1e300},
        {"countdown": "soon"},
        {"countdown": float("nan")},
        {"type": None},
        {"type": ["task-held"]},
    ],
    ids=str,
)
def test_an_event_that_no_worker_sends_is_passed_over(event_log: EventLog, fields: dict[str, Any]) -> None:
    event_log.note({**event("task-held"), **fields})
    assert (event_log.held(), event_log.skipped()) == ([], [])


def test_a_row_is_shown_whatever_its_ids_are() -> None:
    hostile = replace(ROW, key=MessageKey("m\udcff", "t"), task_id="a\udcff", error="ValueError: \udcff")
    (shown,) = legible([hostile])
    assert (shown.key.message_id, shown.task_id, shown.error) == (r"m\udcff", r"a\udcff", r"ValueError: \udcff")
    assert legible([ROW])[0] is ROW
