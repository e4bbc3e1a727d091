"""``docs/explanation/peers.md`` names the test of every scenario, and there is no such test that it does not name."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "explanation" / "peers.md"
SCENARIOS = ("built_in", "callers", "calls", "copies", "redelivery", "retries", "store")


def test_the_page_names_every_test_and_no_other() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    defined = {
        name
        for module in SCENARIOS
        for name in re.findall(r"^def (test_\w+)", (HERE / f"test_{module}.py").read_text(), re.MULTILINE)
    }

    assert named == defined
