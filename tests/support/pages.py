"""The public pages, their code blocks, and what becomes of each block.

A block of Python is run, in the order of the page and in one namespace, unless a comment above it says otherwise::

    <!-- not run: why -->
    <!-- run by: tests/acceptance/test_readme.py -->
    <!-- all run by: tests/acceptance/test_tutorial.py -->          anywhere on the page

``app``, ``Celery`` and ``IdempotentTask`` are there. What else a page's blocks take for granted, and what became of them, stands in a comment
of the page itself, which no reader sees: ``<!-- invisible-code: python``.

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

from celery import Celery
from sybil import Document, Example
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from celery_idempotent import IdempotentTask

__all__ = ["PAGES", "ROOT", "Block", "blocks"]

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

_SAID = re.compile(r"<!-- (not run|run by): ([^\n]+?) -->\n\Z")

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
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str | None
    run_by: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page that its readers see."""
    document = Document.parse(str(ROOT / page), FencedCodeBlockLexer(language=r"[^\n`]*"))
    for example in document:
        found = _said_above(example)
        said = {} if found is None else {found[1]: found[2]}
        if everything := _SAID_OF_ALL.search(document.text):
            said = {"run by": everything[1]}
        yield Block(
            page,
            example.line,
            str(example.region.lexemes["language"]).strip(),
            str(example.region.lexemes["source"]),
            said.get("not run"),
            said.get("run by"),
        )


def _said_above(example: Example) -> re.Match[str] | None:
    return _SAID.search(example.document.text[: example.region.start])


def run(page: Path) -> int:
    """Run the Python of a page, and answer how many of its blocks that were."""
    text = page.read_text()
    for shown, ours in ADDRESSES.items():
        text = text.replace(shown, ours)
    document = Document(text, str(page))
    for region in PythonCodeBlockParser()(document):
        document.add(region)
    module = ModuleType("shop")
    sys.modules["shop"] = module
    document.namespace = vars(module)
    app = Celery("shop", broker="memory://", backend="cache+memory://")
    document.namespace |= {"Celery": Celery, "IdempotentTask": IdempotentTask, "app": app}
    examples = [example for example in document if _said_above(example) is None]
    for example in examples:
        example.evaluate()
    return len(examples)


if __name__ == "__main__":
    warnings.simplefilter("error")
    sys.path.insert(0, os.curdir)
    print(run(ROOT / sys.argv[1]))
