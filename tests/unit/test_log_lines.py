"""Structured log lines: one record per outcome, its fields beside its text, whatever formats them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from celery_idempotent.contrib.log import hook
from celery_idempotent.outcomes import Outcome, OutcomeKind

SKIPPED = Outcome(
    kind=OutcomeKind.SKIPPED,
    task_name="shop.charge",
    message_id="order:o-1",
    task_id="second",
    first_task_id="first",
    status="done",
    age=12.5,
)

_PLAIN = set(vars(logging.makeLogRecord({})))


class JsonLines(logging.Formatter):
    """As the formatters for JSON do it: whatever a record has that it does not always have."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in _PLAIN}
        return json.dumps({"message": record.getMessage(), "level": record.levelname, **extra})


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    logger, written = logging.getLogger("celery_idempotent.outcomes"), io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLines())
    logger.addHandler(handler)
    before, logger.level = logger.level, logging.INFO
    yield written
    logger.level = before
    logger.removeHandler(handler)


def read(lines: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.getvalue().splitlines()]


def test_an_outcome_is_a_line_with_its_fields(lines: io.StringIO) -> None:
    hook(SKIPPED)

    assert read(lines) == [
        {
            "message": "shop.charge[order:o-1]: skipped",
            "level": "INFO",
            "outcome": "skipped",
            "task_name": "shop.charge",
            "message_id": "order:o-1",
            "task_id": "second",
            "first_task_id": "first",
            "status": "done",
            "age": 12.5,
            "count": 1,
        }
    ]


def test_the_reason_and_the_count_are_in_the_text(lines: io.StringIO) -> None:
    hook(Outcome(kind=OutcomeKind.FAILED, task_name="shop.charge", message_id="m", reason="ValueError"))
    hook(Outcome(kind=OutcomeKind.PURGED, count=200))

    assert [line["message"] for line in read(lines)] == ["shop.charge[m]: failed (ValueError)", "200 rows: purged"]


@pytest.mark.parametrize("kind", list(OutcomeKind))
def test_every_outcome_can_be_logged_with_every_field(lines: io.StringIO, kind: OutcomeKind) -> None:
    """No field has a name that a record has already."""
    hook(Outcome(**{field.name: "x" for field in fields(Outcome)} | {"kind": kind}))  # type: ignore[arg-type]

    (line,) = read(lines)
    assert line["outcome"] == kind
    assert set(line) - {"message", "level", "outcome"} == {field.name for field in fields(Outcome)} - {"kind"}


@pytest.mark.parametrize("kind", ["abandoned", "lease_lost", "mismatched", "recovered", "taken_over", "unguarded"])
def test_what_somebody_should_look_at_is_a_warning(lines: io.StringIO, kind: str) -> None:
    hook(Outcome(kind=OutcomeKind(kind), task_name="t", message_id="m"))
    assert [line["level"] for line in read(lines)] == ["WARNING"]


def test_a_level_that_is_off_costs_no_line(lines: io.StringIO) -> None:
    logging.getLogger("celery_idempotent.outcomes").setLevel(logging.WARNING)
    hook(SKIPPED)
    assert read(lines) == []
