"""What a run came to, for a person: tables, as text and as Markdown, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.catalogue import MEASURES
from benchmarks.figures import Round, Spread, ratios, spread, values
from benchmarks.measures import Column, Measure
from benchmarks.subjects import PEERS, PLAIN, STORES
from benchmarks.targets import verdicts

__all__ = ["Table", "as_markdown", "as_text", "plot", "tables"]

#: What a run found: see :func:`benchmarks.run.run`.
Results = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Attributes:
        title: Above it.
        head: Of its columns; the first is the subjects'.
        rows: As they are printed.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(results: Results) -> Iterator[Table]:
    """Yield a table for each measurement that was taken."""
    for name, measure in MEASURES.items():
        found = results["measures"].get(name)
        if found is not None and found["rounds"]:
            yield _table(measure, found["rounds"], found["count"])


def _table(measure: Measure, rounds: Sequence[Round], count: int) -> Table:
    found_in = {name for found in rounds for name in found}
    subjects = [name for name in (PLAIN.name, *STORES, *PEERS) if name in found_in]
    columns = [column for column in measure.columns if any(column.figure in found for found in rounds[0].values())]
    compared = measure.figures if PLAIN.name in subjects else ()
    several = len(measure.figures) > 1
    head = [
        "",
        *(f"{figure} / plain" if several else "/ plain" for figure in compared),
        *(column.title for column in columns),
    ]
    rows = [
        [
            name,
            *(shown(spread(ratios(rounds, figure, name, PLAIN.name)), ".2f") for figure in compared),
            *(_cell(rounds, name, column) for column in columns),
        ]
        for name in subjects
    ]
    times = f"{len(rounds)} rounds of {count:,}" if len(rounds) > 1 else f"{count:,} messages"
    return Table(f"{measure.title}; {times}", head, rows)


def _cell(rounds: Sequence[Round], subject: str, column: Column) -> str:
    found = spread(values(rounds, column.figure, subject))
    return "-" if found is None else format(found.median, column.form)


def shown(found: Spread | None, form: str) -> str:
    """Return a median and its spread."""
    if found is None:
        return "-"
    if found.low == found.high:
        return format(found.median, form)
    return f"{found.median:{form}} ({found.low:{form}}..{found.high:{form}})"


def as_text(results: Results) -> str:
    """For a terminal."""
    parts: list[str] = []
    for table in tables(results):
        lines = [table.head, *table.rows]
        widths = [max(len(line[place]) for line in lines) for place in range(len(table.head))]
        parts.append(table.title)
        for line in lines:
            cells = [
                cell.ljust(widths[0]) if not place else cell.rjust(widths[place]) for place, cell in enumerate(line)
            ]
            parts.append("  ".join(cells).rstrip())
        parts.append("")
    return "\n".join([*parts, *_verdicts(results), "", *_foot(results)])


def as_markdown(results: Results) -> str:
    """For a page."""
    parts: list[str] = []
    for table in tables(results):
        lines = [table.head, ["---", *("---:" for _ in table.head[1:])], *table.rows]
        parts += [f"### {table.title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""]
    told = [f"* {line}" for line in _verdicts(results)]
    return "\n".join(
        [*parts, "### Targets", "", *told, "", "### Machine", "", *(f"* {line}" for line in _foot(results))]
    )


def _verdicts(results: Results) -> list[str]:
    return [
        f"{verdict.target.number}. {verdict.target.text}: {shown(verdict.found, verdict.target.form)}, bound {verdict.target.bound_text}: "
        f"{'reached' if verdict.reached else 'MISSED'}"
        for verdict in verdicts(results)
    ]


def _foot(results: Results) -> list[str]:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    runs = dict.fromkeys(
        f"{found['date']}, commit {found['commit']}, seed {found['seed']}" for found in results["measures"].values()
    )
    computer = (
        f"{machine['processor']}, {machine['processors']} processors, {machine['memory']} of memory; {machine['system']}; "
        f"a write that waits for the disk (fdatasync of 8 KiB) takes {machine['fdatasync_ms']:.2f} ms"
    )
    return [computer, versions, *runs]


def plot(results: Results, path: Path) -> None:
    """Bars: ratios to plain Celery with their spread, and latencies."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [
        (MEASURES[name], figure, found["rounds"])
        for name, found in results["measures"].items()
        for figure in MEASURES[name].figures
        if found["rounds"] and PLAIN.name in found["rounds"][0]
    ]
    columns = 2
    lines = max(-(-len(drawn) // columns), 1)
    figure_, axes = plt.subplots(lines, columns, figsize=(12, 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    for axis, (measure, figure, rounds) in zip(axes.flat, drawn, strict=False):
        found = {name: spread(ratios(rounds, figure, name, PLAIN.name)) for name in (*STORES, *PEERS)}
        bars = {name: value for name, value in found.items() if value is not None}
        middle = [value.median for value in bars.values()]
        errors = [
            [value.median - value.low for value in bars.values()],
            [value.high - value.median for value in bars.values()],
        ]
        colours = ["#4c78a8" if name in STORES else "#b8b0ac" for name in bars]
        axis.barh(list(bars), middle, xerr=errors, color=colours, ecolor="#444444", capsize=3)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.invert_yaxis()
        title = fill(measure.title, 64)
        axis.set_title(f"{title}\n{figure}, as a multiple of plain Celery's", fontsize=9)
    figure_.tight_layout()
    figure_.savefig(path, dpi=110)
    plt.close(figure_)
