"""The public pages, their code blocks, and what becomes of each block.

A block of Python is run, in the order of the page and in one namespace, unless a comment above it says otherwise::

    <!-- not run: why -->
    <!-- run by: tests/acceptance/test_readme.py -->
    <!-- all run by: tests/acceptance/test_tutorial.py -->          anywhere on the page
    <!-- wide: why -->                                             directly above a block of more than 88 columns

``app``, ``Celery`` and ``IdempotentTask`` are there. What else a page's blocks need, and the checks of what they did, stand in a file next to the
page: ``docs/how-to/atomic.py`` for ``atomic.md``. A line above each piece says when it runs; blocks that are not run here do not count::

    # %% before block 1
    # %% after block 3

``python -m tests.support.pages PAGE`` runs the blocks of a page, in the directory where it is started.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from celery import Celery
from sybil import Document, Example
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from celery_idempotent import EagerStoreWarning, IdempotentTask

__all__ = ["PAGES", "ROOT", "Block", "blocks", "hidden_code", "run_here"]

ROOT = Path(__file__).resolve().parents[2]

#: Every page that a reader is given.
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        ROOT / "changelog.d/README.md",
        ROOT / "example_project/README.md",
    )
)

#: What is shown, and what is there when a page is run: only the addresses are ours.
ADDRESSES = {
    'backend="redis://localhost"': 'backend="cache+memory://"',
    "redis://localhost": "memory://",
    "postgresql+psycopg://localhost/shop": "sqlite:///shop.db",
}

_SAID = re.compile(r"<!-- (not run|run by): ([^\n]+?) -->\n(?:<!-- wide: [^\n]+? -->\n)?\Z")

_WIDE = re.compile(r"<!-- wide: ([^\n]+?) -->\n\Z")

_PIECE = re.compile(r"^# %% (before|after) block (\d+)$", re.MULTILINE)

_SAID_OF_ALL = re.compile(r"^<!-- all run by: ([^\n]+?) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        page: The page, from the root of the repository.
        line: Where it begins.
        language: What stands behind the fence; empty for none.
        text: What is in it.
        not_run: Why it is not run, where the page says so.
        run_by: The test that runs it, where the page says so.
        wide: Why it is wider than others, where the page says so.
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str | None
    run_by: str | None
    wide: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> Iterator[Block]:
    """Yield the blocks of a page that its readers see."""
    document = Document.parse(str(ROOT / page), FencedCodeBlockLexer(language=r"[^\n`]*"))
    for example in document:
        found = _said_above(example)
        said = {} if found is None else {found[1]: found[2]}
        if everything := _SAID_OF_ALL.search(document.text):
            said = {"run by": everything[1]}
        wide = _WIDE.search(document.text[: example.region.start])
        yield Block(
            page,
            example.line,
            str(example.region.lexemes["language"]).strip(),
            str(example.region.lexemes["source"]),
            said.get("not run"),
            said.get("run by"),
            None if wide is None else wide[1],
        )


def _said_above(example: Example) -> re.Match[str] | None:
    return _SAID.search(example.document.text[: example.region.start])


def run_here(page: Path, namespace: dict[str, Any] | None = None) -> list[Example]:
    """Return the Python blocks that are run with a page."""
    document = Document(_with_our_addresses(page.read_text()), str(page))
    document.namespace = {} if namespace is None else namespace
    for region in PythonCodeBlockParser()(document):
        document.add(region)
    return [example for example in document if _said_above(example) is None]


def hidden_code(page: Path) -> dict[tuple[str, int], str]:
    """Return the pieces of the file next to a page, by when they run: ``("after", 3)``."""
    file = page.with_suffix(".py")
    if not file.exists():
        return {}
    text = _with_our_addresses(file.read_text())
    pieces = list(_PIECE.finditer(text))
    ends = [piece.start() for piece in pieces[1:]] + [len(text)]
    # As many empty lines above as keep a traceback's line numbers right.
    return {
        (piece[1], int(piece[2])): "\n" * text.count("\n", 0, piece.end()) + text[piece.end() : end]
        for piece, end in zip(pieces, ends, strict=True)
    }


def run(page: Path) -> int:
    """Run the Python of a page, and answer how many of its blocks that were."""
    module = ModuleType("shop")
    sys.modules["shop"] = module
    app = Celery("shop", broker="memory://", backend="cache+memory://")
    namespace = vars(module)
    namespace |= {"Celery": Celery, "IdempotentTask": IdempotentTask, "app": app}
    hidden = hidden_code(page)

    def run_hidden(when: str, number: int) -> None:
        code = compile(hidden.get((when, number), ""), str(page.with_suffix(".py")), "exec", dont_inherit=True)
        exec(code, namespace)

    examples = run_here(page, namespace)
    for number, example in enumerate(examples, start=1):
        run_hidden("before", number)
        example.evaluate()
        run_hidden("after", number)
    return len(examples)


def _with_our_addresses(text: str) -> str:
    for shown, ours in ADDRESSES.items():
        text = text.replace(shown, ours)
    return text


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", EagerStoreWarning)  # a page's store is in the directory where it is run
    sys.path.insert(0, os.curdir)
    print(run(ROOT / sys.argv[1]))
