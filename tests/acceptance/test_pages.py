"""What the public pages show is run; what cannot be run says why; and every command line that they show is a real one."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from celery_idempotent.cli import idempotent
from celery_idempotent.stores.sql import queue_log_table
from tests.support.pages import PAGES, ROOT, Block, blocks, hidden_code, run_here

BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(*languages: str) -> Any:
    """Return the blocks of these languages, a test each."""
    return pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in languages], ids=str)


# -- each block ---------------------------------------------------------------------------------------------------------------

#: Of these nothing can be wrong that a test would find.
_DRAWN = {"", "text", "mermaid", "{eval-rst}"}
_DATA: dict[str, Callable[[str], Any]] = {
    "json": json.loads,
    "toml": tomllib.loads,
    "yaml": lambda text: list(yaml.safe_load_all(text)),
}


def test_each_block_is_run_or_says_why_it_is_not() -> None:
    left = [
        str(block)
        for block in BLOCKS
        if block.language not in {"python", "console", *_DRAWN, *_DATA} and not (block.not_run or block.run_by)
    ]
    assert left == [], "neither run nor excused: see tests/support/pages.py"
    assert len(BLOCKS) > 50


@of("python")
def test_every_python_block_compiles(block: Block) -> None:
    ast.parse(block.text, str(block))


def test_every_block_of_data_can_be_parsed() -> None:
    for block in BLOCKS:
        if block.language in _DATA and block.not_run is None:
            _DATA[block.language](block.text)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.run_by], ids=str)
def test_a_block_run_by_another_test_is_in_that_test(block: Block) -> None:
    text = (ROOT / str(block.run_by)).read_text()
    if Path(block.page).name in text:
        return
    there = {ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)}
    missing = [shown for node in ast.parse(block.text).body if (shown := ast.unparse(node)) not in there]
    assert missing == []


@pytest.mark.parametrize(
    "page",
    dict.fromkeys(block.page for block in BLOCKS if block.language == "python" and not (block.not_run or block.run_by)),
)
def test_a_pages_python_runs(page: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.support.pages", page]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0


#: What fits into a code host's column. Diagrams are drawn, so their source has no width.
_COLUMNS = 88


def test_code_blocks_fit_into_the_column() -> None:
    too_wide = [
        f"{block.page}:{block.line + number}: {len(line)} columns"
        for block in BLOCKS
        if block.language not in {"mermaid", "{eval-rst}"} and block.wide is None
        for number, line in enumerate(block.text.splitlines(), start=1)
        if len(line) > _COLUMNS
    ]
    assert too_wide == []


@pytest.mark.parametrize("page", [page for page in PAGES if (ROOT / page).with_suffix(".py").exists()])
def test_each_hidden_piece_has_its_block(page: str) -> None:
    examples = run_here(ROOT / page)
    pieces = hidden_code(ROOT / page)
    places = [(number, when == "after") for when, number in pieces]
    assert places
    assert places == sorted(places)
    assert all(1 <= number <= len(examples) for number, _ in places)


def test_no_page_hides_code_in_its_text() -> None:
    assert [page for page in PAGES if "<!-- invisible-code" in (ROOT / page).read_text()] == []


# -- command lines ------------------------------------------------------------------------------------------------------------

_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

#: Programs that are not ours to check.
_FOREIGN = {"cat", "curl", "cd", "docker", "echo", "export", "kill", "mail", "pip", "psql", "python", "redis-cli", "rm"}


def commands(block: Block) -> list[str]:
    """Return what a block says to type: the lines after a dollar sign, or all lines if there is none."""
    text = block.text.replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")] or lines


@of("console")
def test_every_command_line_is_accepted(block: Block) -> None:
    for line in commands(block):
        words = shlex.split(line, comments=True)
        for operator in ("|", "||", "&&", "&", ">", ";"):
            words = words[: words.index(operator)] if operator in words else words
        while words and "=" in words[0]:
            words = words[1:]
        match words:
            case ["make", target, *_]:
                assert target in _TARGETS, line
            case ["python", "-m", module, *_] if module != "venv":
                assert importlib.util.find_spec(module) is not None, line
            case ["celery", *rest]:
                check_celery(rest, line)
            case [program, *_]:
                assert program in _FOREIGN, f"{line}: neither ours nor one of {_FOREIGN}"


def check_celery(words: list[str], line: str) -> None:
    """Have the command line's own parser read it."""
    from celery.bin.celery import celery

    if "idempotent" in words:
        at = words.index("idempotent")
        assert words[at - 2] == "-A" if at > 1 else False, line
        assert len(words) > at + 1, line
        command = idempotent.commands[words[at + 1]]
        command.make_context(words[at + 1], words[at + 2 :], parent=click.Context(idempotent))
    else:
        subcommand = next(word for word in words if not word.startswith("-") and words[words.index(word) - 1] != "-A")
        assert subcommand in celery.commands, line


def test_the_page_of_the_table_has_its_columns() -> None:
    import sqlalchemy as sa

    page = (ROOT / "docs" / "reference" / "table.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(queue_log_table(sa.MetaData()).c.keys())


def test_the_brokers_page_has_measured_costs() -> None:
    """After a run of `make bench` the page has to be told."""
    measured = (ROOT / "docs" / "explanation" / "benchmarks.md").read_text()

    def figures(heading: str, subject: str) -> tuple[str, float]:
        """Return the ratio to plain Celery, and the milliseconds of processor time."""
        table = measured.partition(f"### {heading}")[2].partition("###")[0]
        row = next(line for line in table.splitlines() if line.startswith(f"| {subject} |"))
        ratio, _, cpu, *_ = (cell.strip() for cell in row.split("|")[2:])
        return ratio.partition(" ")[0], float(cpu)

    said = (ROOT / "docs" / "explanation" / "brokers.md").read_text().partition("**What it costs**, as [measured]")[2]
    publish, batch, consume = "Publishing: one", "Publishing: 1,000 calls in a batch", "Consuming a no-op"
    for heading in (publish, batch, consume):
        for subject in ("postgresql", "redis"):
            assert figures(heading, subject)[0] in said, (heading, subject)
    for subject, form in (
        ("postgresql", "{:.1f} ms for a message that is sent and {:.1f} ms"),
        ("redis", "{:.1f} and {:.1f} ms"),
    ):
        more = [figures(heading, subject)[1] - figures(heading, "plain")[1] for heading in (publish, consume)]
        assert form.format(*more) in said, (subject, more)


def test_the_table_of_options_is_whole() -> None:
    from celery_idempotent.settings import OPTION_NAMES

    table = (ROOT / "docs" / "reference" / "task.md").read_text().partition("## Options")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == {*OPTION_NAMES, "idempotent"}
