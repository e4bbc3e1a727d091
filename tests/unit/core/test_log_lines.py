"""Structured log lines: one record per outcome, with its fields and its text, for any formatter."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import celery_idempotent
from celery_idempotent.contrib.log import hook
from celery_idempotent.core import log_lines
from celery_idempotent.core.records import MessageKey
from celery_idempotent.hooks import Outcome, OutcomeKind

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
    """Return a record's extra fields, as formatters for JSON do."""

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
def test_outcomes_that_need_attention_are_warnings(lines: io.StringIO, kind: str) -> None:
    hook(Outcome(kind=OutcomeKind(kind), task_name="t", message_id="m"))
    assert [line["level"] for line in read(lines)] == ["WARNING"]


def test_a_level_that_is_off_costs_no_line(lines: io.StringIO) -> None:
    logging.getLogger("celery_idempotent.outcomes").setLevel(logging.WARNING)
    hook(SKIPPED)
    assert read(lines) == []


FORGED = "m\n[2026-01-01 00:00:00: ERROR] shop.charge[x] is lost \x1b[2J\r\x9b\u2028\udcff"


@pytest.mark.parametrize("name", log_lines.LOGGERS)
def test_an_id_cannot_forge_a_line(name: str, caplog: pytest.LogCaptureFixture) -> None:
    key = MessageKey(FORGED, "shop.charge")
    with caplog.at_level("INFO", logger=name):
        logging.getLogger(name).info("%s[%s] is skipped: %s", key.task_name, key.message_id, ValueError(FORGED))
        hook(replace(SKIPPED, message_id=FORGED))

    assert len(caplog.records) == 2
    for record in caplog.records:
        text = record.getMessage()
        assert text.isprintable()
        assert r"m\n[2026-01-01" in text
        assert r"\x1b[2J\r\x9b\u2028\udcff" in text


def test_a_line_as_it_should_be_keeps_its_template(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="celery_idempotent"):
        logging.getLogger("celery_idempotent").info("%s is held for %.1f s", "shop.charge[zażółć]", 1.0)
        logging.getLogger("celery_idempotent").error("%s failed", "shop.charge[m]", exc_info=ValueError("two\nlines"))

    held, failed = caplog.records
    assert (held.msg, held.args) == ("%s is held for %.1f s", ("shop.charge[zażółć]", 1.0))
    assert failed.exc_info
    assert "two\nlines" in str(failed.exc_info[1])


def test_every_logger_of_the_library_is_one_of_these() -> None:
    source = "".join(path.read_text() for path in Path(celery_idempotent.__file__).parent.rglob("*.py"))
    assert set(re.findall(r'logging\.getLogger\("([^"]+)"\)', source)) == set(log_lines.LOGGERS)
