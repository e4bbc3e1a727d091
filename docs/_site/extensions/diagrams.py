"""```mermaid blocks become drawings, without a network: a script of the site itself draws them.

sphinxcontrib-mermaid does the like, but loads its script as a module, which a browser refuses for a page that is opened from disk.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.errors import ConfigError

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
        text = escape("\n".join(self.content))
        return [nodes.raw("", f'<pre class="mermaid">{text}</pre>', format="html", classes=["mermaid"])]


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
    app.connect("html-page-context", add_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
