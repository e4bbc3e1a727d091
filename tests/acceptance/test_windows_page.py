"""``docs/explanation/windows.md`` names a test for every window, and each is there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "explanation" / "windows.md"


def test_every_window_names_tests_that_are_there() -> None:
    defined = {
        name
        for module in TESTS.rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)", module.read_text(), re.MULTILINE)
    }
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|") and not line.startswith("|---")]
    heads = [row for row in rows if "shown by" in row]
    windows = [row for row in rows if row not in heads]
    assert len(windows) > 25
    for row in windows:
        shown_by = row.rstrip("| ").rpartition("|")[2]
        named = re.findall(r"`(test_\w+)`", shown_by)
        # A row may refer to the one above it.
        assert named or "the same" in shown_by or "likewise" in shown_by, row
        assert set(named) <= defined, f"{set(named) - defined} in {row}"
