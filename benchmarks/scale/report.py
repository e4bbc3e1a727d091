"""The figures for people: ``bench/scale.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["markdown"]


def markdown(figures: dict[str, Any]) -> str:
    """Return the page, of the parts that there are."""
    sections = [f"# A queue log of {figures['rows']:,} rows\n\n{_machine(figures['machine'])}"]
    for name, write in (
        ("size", _size),
        ("plans", _plans),
        ("latency", _latency),
        ("price", _price),
        ("layouts", _layouts),
        ("purge", _purge),
        ("cluster", _cluster),
    ):
        if name in figures:
            sections.append(write(figures[name]))
    return "\n\n".join(sections) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processors']} processors ({machine['processor']}), {machine['memory GB']:.0f} GB of memory, PostgreSQL "
        f"{machine['postgresql']}, Python {machine['python']}, {machine['date']}. Settings: "
        + ", ".join(f"`{name}={value}`" for name, value in machine["settings"].items())
        + "."
    )


def _size(size: dict[str, Any]) -> str:
    rows = [(name, f"{total / 1e9:.2f}", f"{total / size['rows']:.0f}") for name, total in size["bytes"].items()]
    hot = f"HOT updates while it was filled: {size['hot']:.1%} of {size['updates']:,}."
    return f"## Size\n\n{_table(('', 'GB', 'bytes a row'), rows)}\n\n{hot}"


def _plans(plans: dict[str, Any]) -> str:
    others = "\n\n".join(f"```\n{each}\n```" for each in plans["otherwise"])
    whole = ", ".join(
        f"{name.replace('_', ' ')}: {seconds:.1f} s" for name, seconds in plans["seconds of what reads all"].items()
    )
    text = f"{plans['statements']} statements looked at, {len(plans['otherwise'])} of them carried out in another way than is pinned."
    return f"## Plans\n\n{text} What is answered by the whole table: {whole}.\n\n{others}".rstrip()


def _latency(latency: dict[str, Any]) -> str:
    rows = []
    tables = list(latency["tables"])
    for verb in latency["tables"][tables[0]]:
        for which in ("p50", "p99"):
            times = [f"{latency['tables'][table][verb][which]:.3f}" for table in tables]
            ratio = latency["ratios"][tables[0]][verb]
            quartiles = ratio.get("p50 by round, quartiles") if which == "p50" else None
            spread = "" if quartiles is None else f"{quartiles[0]:.2f} to {quartiles[2]:.2f}"
            rows.append((verb, which, *times, f"{ratio[which]:.2f}", spread))
    head = ("ms", "", *tables, "ratio", "by round, quartiles")
    return (
        f"## Latency\n\n{latency['messages']:,} messages in each, in {latency['rounds']} turns.\n\n{_table(head, rows)}"
    )


def _priced(name: str, price: dict[str, Any]) -> tuple[str, ...]:
    parts = price["wal bytes a message"]
    return (
        name,
        f"{price['wal records, bytes a message']:.0f}",
        *(f"{parts.get(part, 0):.0f}" for part in ("Heap", "Btree")),
        f"{price['wal page images, bytes a message']:.0f}",
        f"{price['hot share']:.0%}",
        f"{price['server processor ms a message']:.2f}",
        *(f"{price['bytes a row'][part]:.0f}" for part in ("heap", "indexes")),
    )


_PRICE = (
    "",
    "WAL, bytes a message",
    "of it heap",
    "index",
    "page images besides",
    "HOT",
    "server ms",
    "heap a row",
    "indexes a row",
)


def _price(prices: dict[str, Any]) -> str:
    rows = [_priced(name, price) for name, price in prices.items()]
    return f"## What a message costs the server\n\nRecorded, claimed and completed, behind a checkpoint.\n\n{_table(_PRICE, rows)}"


def _layouts(layouts: list[dict[str, Any]]) -> str:
    return f"## Indexes and fill factor\n\n{_table(_PRICE, [_priced(each['layout'], each) for each in layouts])}"


def _purge(purge: dict[str, Any]) -> str:
    rows = [
        (verb, which, f"{purge['traffic alone'][verb][which]:.2f}", f"{purge['traffic beside'][verb][which]:.2f}")
        for verb in purge["traffic alone"]
        for which in ("p50", "p99")
    ]
    rates = ", ".join(f"{rate:,.0f}" for rate in purge["rows per second, by phase"])
    text = (
        f"{purge['rows']:,} rows in batches of {purge['batch']} (median {purge['batch ms']['p50']:.1f} ms, longest "
        f"{purge['batch ms']['max']:.0f} ms); rows a second, phase by phase: {rates}. Autovacuums of the table so far: "
        f"{purge['autovacuums']}; dead rows left: {purge['dead rows left']:,}."
    )
    return f"## Purge\n\n{text}\n\n{_table(('ms', '', 'alone', 'beside the purge'), rows)}"


def _cluster(sizes: list[dict[str, Any]]) -> str:
    rows = [
        (
            str(each["masters"]),
            f"{each['messages a second, one client']:.0f}",
            f"{each['client processor ms a message']:.3f}",
            f"{each['server processor ms a message, all nodes']:.3f}",
            f"{each['share of the busiest node']:.0%}",
        )
        for each in sizes
    ]
    head = (
        "masters",
        "messages a second, one client",
        "client ms a message",
        "all nodes, ms a message",
        "busiest node",
    )
    return f"## Redis Cluster\n\n{_table(head, rows)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
