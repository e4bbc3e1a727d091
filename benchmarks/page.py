"""The page in the documentation: a run's tables, between two markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import as_markdown, plot

__all__ = ["BEGIN", "END", "PAGE", "write_page"]

PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "benchmarks.md"

BEGIN, END = "<!-- figures: python -m benchmarks page -->", "<!-- end of figures -->"


def write_page(results: dict[str, Any], page: Path = PAGE) -> None:
    """Replace the figures of the page, and its picture, by a run's.

    Raises:
        ValueError: The page has not its two markers.
    """
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no two lines {BEGIN} and {END}, between which the figures go")
    page.write_text(f"{before}{BEGIN}\n\n{as_markdown(results)}\n\n{END}{after}")
    plot(results, page.with_suffix(".png"))
