"""What the command line prints: for people without surprises for their terminal, for programs as JSON."""

from __future__ import annotations

import io
import json
import sys
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from celery_idempotent.cli.printing import columns_taken, plain, print_, printable, sheets, table

MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


class TestATable:
    def test_columns_line_up(self) -> None:
        records: list[dict[str, Any]] = [{"id": "a", "at": MOMENT, "n": 10}, {"id": "longer", "at": None, "n": 5}]
        assert table(records, ("id", "at", "n")) == [
            "id      at                             n",
            "a       2026-01-02 03:04:05.678+00:00  10",
            "longer  -                              5",
        ]

    def test_by_what_a_terminal_shows(self) -> None:
        lines = list(table([{"id": "订单", "n": 1}, {"id": "e\u0301", "n": 2}, {"id": "abcd", "n": 3}], ("id", "n")))
        assert [columns_taken(line[: line.rindex(" ")]) for line in lines] == [5, 5, 5, 5]

    def test_an_empty_table_says_no_rows(self) -> None:
        assert table([], ("id",)) == ["no rows"]

    def test_a_line_break_in_an_id_is_not_one_in_the_table(self) -> None:
        assert table([{"id": "a\nb"}], ("id",)) == ["id", "a\\nb"]


def test_sheets_are_separated_by_a_line() -> None:
    assert list(sheets([{"id": "a", "status": None}, {"id": "b", "status": 0}])) == [
        "id      a",
        "status  -",
        "",
        "id      b",
        "status  0",
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ключ 订单 é", "ключ 订单 é"),
        ("red \x1b[31m", "red \\x1b[31m"),
        ("tab\tand\rreturn", "tab\\tand\\rreturn"),
        ("backwards \u202e", "backwards \\u202e"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_unencodable_characters_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert printable("é") == "\\xe9"


@pytest.mark.parametrize(
    ("value", "is_"),
    [
        (MOMENT, "2026-01-02T03:04:05.678901+00:00"),
        (date(2026, 1, 2), "2026-01-02"),
        (Decimal("1.50"), "1.50"),
        (UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (b"ab", "b'ab'"),
        ({("a", 1): {2}, 5: (1, None)}, {"('a', 1)": [2], "5": [1, None]}),
        ([True, 0, 1.5, "é", None], [True, 0, 1.5, "é", None]),
    ],
)
def test_any_argument_and_result_has_some_json(value: object, is_: object) -> None:
    assert plain(value) == is_
    json.dumps(plain(value))


def test_json_is_ascii_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    print_(True, [{"id": "é\n", "at": MOMENT}], lambda: pytest.fail("the text was asked for"))
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert json.loads(printed) == [{"id": "é\n", "at": "2026-01-02T03:04:05.678901+00:00"}]
