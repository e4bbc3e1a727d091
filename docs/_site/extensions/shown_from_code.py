"""What the reference takes from the code where autodoc has no form for it: the app's settings, and the table's DDL."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sqlalchemy import MetaData, create_mock_engine

from celery_idempotent import queue_log_table
from celery_idempotent.settings import PREFIX, Settings

DIALECTS = {
    "postgresql": "postgresql+psycopg://",
    "mysql": "mysql+pymysql://",
    "mariadb": "mariadb+pymysql://",
    "sqlite": "sqlite://",
}

#: What reStructuredText shows as nothing.
NOTHING = "\\ "


class AppSettings(Directive):
    """The settings of an app, as the class that reads them has them."""

    def run(self) -> list[nodes.Node]:
        _, _, text = (inspect.getdoc(Settings) or "").partition("Attributes:\n")
        said = dict(re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w+:|\Z)", text, re.DOTALL | re.MULTILINE))
        lines: list[str] = []
        for field in fields(Settings):
            lines += [
                f".. py:data:: {PREFIX}{field.name}",
                f"   :type: {field.type}",
                f"   :value: {field.default!r}",
                "",
                *(f"   {line.strip()}" for line in said[field.name].splitlines()),
                "",
            ]
        found = nodes.Element()
        self.state.nested_parse(StringList(lines, source=__file__), self.content_offset, found)
        return found.children


class TableDefinition(Directive):
    """The statements that `idempotent init` runs on a kind of database."""

    required_arguments: ClassVar[int] = 1

    def run(self) -> list[nodes.Node]:
        statements: list[str] = []

        def note(statement: Any, *_: Any, **__: Any) -> None:
            text = str(statement.compile(dialect=engine.dialect)).strip().replace("\t", "    ")
            statements.append("\n".join(line.rstrip() for line in text.splitlines()) + ";")

        engine = create_mock_engine(DIALECTS[self.arguments[0]], note)
        metadata = MetaData()
        queue_log_table(metadata)
        metadata.create_all(engine, checkfirst=False)
        code = "\n".join(statements)
        return [nodes.literal_block(code, code, language="sql")]


def keep_colons(_app: Sphinx, what: str, _name: str, _thing: object, _options: object, lines: list[str]) -> None:
    """Have Napoleon not take what stands before a colon, in the first line about an attribute or a result, for its type."""
    first = (
        [0]
        if what in {"attribute", "data"}
        else [at + 1 for at, line in enumerate(lines) if line.strip() == "Returns:"]
    )
    for at in reversed(first):
        indent = len(lines[at]) - len(lines[at].lstrip())
        lines.insert(at, " " * indent + NOTHING)


def mark_options(_app: Sphinx, _context: object, lines: list[str]) -> None:
    """Have options in a command's description stand as what is typed: --force would begin with a dash."""
    lines[:] = [re.sub(r"(?<![\w`-])(--[a-z-]+)", r"``\1``", line) for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("sphinx-click-process-description", mark_options)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before Napoleon
    app.add_directive("app-settings", AppSettings)
    app.add_directive("table-definition", TableDefinition)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
