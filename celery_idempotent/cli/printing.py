"""Print tables and sheets that are safe for a terminal, and JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from unicodedata import combining, east_asian_width
from uuid import UUID

import click

__all__ = ["columns_taken", "plain", "print_", "printable", "sheets", "table"]


def print_(json_: bool, data: Any, text: Callable[[], Iterable[str]]) -> None:
    """Print data as JSON, or as text for people."""
    lines = [json.dumps(plain(data), indent=2)] if json_ else map(printable, text())
    for line in lines:
        click.echo(line)


def plain(value: Any) -> Any:
    """Return the nearest value that JSON has."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, (date, time)):
        return value.isoformat()
    return str(value) if isinstance(value, (Decimal, UUID)) else repr(value)


def printable(line: str) -> str:
    """Escape characters that would move a terminal's cursor, or that its encoding lacks, since an id can be any text."""
    escaped = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return value.isoformat(sep=" ", timespec="milliseconds") if isinstance(value, datetime) else str(value)


def table(records: Sequence[dict[str, Any]], columns: Sequence[str]) -> Iterable[str]:
    """Return the lines of a table."""
    if not records:
        return ["no rows"]
    rows = [columns, *([printable(_cell(record[column])) for column in columns] for record in records)]
    widths = [max(columns_taken(row[index]) for row in rows) for index in range(len(columns))]
    return ["  ".join(map(_padded, row, widths)).rstrip() for row in rows]


def _padded(cell: str, width: int) -> str:
    return cell + " " * (width - columns_taken(cell))


def columns_taken(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(0 if combining(character) else 2 if east_asian_width(character) in "FW" else 1 for character in text)


def sheets(records: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Yield one value a line, record after record."""
    for number, record in enumerate(records):
        if number:
            yield ""
        width = max(map(len, record))
        for name, value in record.items():
            yield f"{name.ljust(width)}  {_cell(value)}"
