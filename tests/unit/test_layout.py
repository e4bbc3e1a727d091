"""The package's layout: few modules in the root, none too long, and a map that is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import celery_idempotent

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(celery_idempotent.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

#: Modules that users see when they open the package.
AT_THE_DOOR = 12

#: Lines beyond which a module says why it is not cut.
LONG = 350
WHY = re.compile(r"^# Longer than most: .+\.$", re.MULTILINE)

#: Folders of tests that the package has no folder for: of what several of its parts do together, and of ``tests/support``.
OF_NO_SINGLE_PART = {"brokers", "frameworks", "outages", "poolers", "support"}


def test_the_root_has_few_modules() -> None:
    assert len([path for path in MODULES if len(path.parts) == 1]) <= AT_THE_DOOR


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_long_module_says_why(module: Path) -> None:
    text = (PACKAGE / module).read_text()
    assert (text.count("\n") > LONG) == bool(WHY.search(text))


@pytest.mark.parametrize("layer", ["unit", "integration"])
def test_tests_have_the_packages_folders(layer: str) -> None:
    folders = {path.name for path in (ROOT / "tests" / layer).iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders <= {path.name for path in PACKAGE.iterdir()} | OF_NO_SINGLE_PART


def test_the_map_names_places_that_are_there() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    _, _, rest = contributing.partition("## Where things are")
    the_map, _, _ = rest.partition("\n## ")
    named = set(re.findall(r"`((?:\w+/)*\w+(?:\.py|\.md|/)|(?:\w+/)+)`", the_map))
    folders = {path.name for path in PACKAGE.rglob("*/")}
    missing = {
        name
        for name in named
        if not (ROOT / name).exists() and not (PACKAGE / name).exists() and name.rstrip("/") not in folders
    }
    assert len(named) > 50
    assert missing == set()
