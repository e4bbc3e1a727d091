"""``docs/explanation/peers.md`` names the test of every scenario, and none of them is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "explanation" / "peers.md"
SCENARIOS = ("built_in", "callers", "calls", "copies", "redelivery", "retries", "store")


def defined_in(modules: Iterable[Path]) -> set[str]:
    return {name for module in modules for name in re.findall(r"^ *def (test_\w+)", module.read_text(), re.MULTILINE)}


def test_the_page_names_exactly_the_scenarios_tests() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))

    assert named >= defined_in(HERE / f"test_{module}.py" for module in SCENARIOS)
    assert named <= defined_in(HERE.parent.rglob("test_*.py"))
