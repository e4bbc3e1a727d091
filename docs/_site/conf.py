"""How Sphinx builds the site: ``make docs``.

Its source is the repository itself, so that a link between two pages is the same on a code host and in the site. What may not differ
from the code (options, errors, commands, columns) is taken from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import celery_idempotent

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "celery-idempotent"
author = "the celery-idempotent authors"
release = version = celery_idempotent.__version__
copyright = author  # noqa: A001 - Sphinx's name for it

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_external_toc",
    "diagrams",
    "shown_from_code",
]
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "changelog.d/README.md",
    "example_project/README.md",
    "docs/**.md",
]
external_toc_path = "docs/_site/_toc.yml"
# Every reference leads somewhere; see nitpick_ignore_regex for whose names are not ours.
nitpicky = True

# -- pages ---------------------------------------------------------------------------------------------------------------

# Headings are anchors under the names that code hosts give them. Links to one that is not there are warnings, and so errors.
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
suppress_warnings = [
    "misc.highlighting_failure",  # JSON with three dots in it, and the like
]

# -- what is generated from docstrings -----------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Hazard"]
napoleon_use_rtype = False
python_display_short_literal_types = True
python_maximum_signature_line_length = 100
add_module_names = False

# Other people's names, and our own that are told in words: the site is built without a network, so nobody else's index is there.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!celery_idempotent).*"),
    (r"py:class", r"celery_idempotent\.(message\.ids\.ByArguments|settings\.Settings|worker\.step_calls\.[PT])"),
]

# -- looks ---------------------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"celery-idempotent {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = True  # the search shows a line of each page that it finds
html_show_sphinx = False
templates_path = ["templates"]
# The front door: the home page has the path that it has in the repository.
html_additional_pages = {"index": "front-door.html"}
