"""Measure a queue log of many rows: ``python -m benchmarks.scale --rows 10000000``; or ``make bench-scale ROWS=10000000``.

Ten million rows take half an hour to fill and 20 GB of disk. ``--data`` keeps them for another run, and ``--parts`` chooses what is
measured; what an earlier run has written to the same JSON stays. The purge deletes two sevenths of the rows and comes last.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from benchmarks.scale.cluster import cluster
from benchmarks.scale.filling import IN_FLIGHT, fill
from benchmarks.scale.latency import latency
from benchmarks.scale.layouts import layouts, price
from benchmarks.scale.planning import planning
from benchmarks.scale.purging import purging
from benchmarks.scale.report import markdown
from benchmarks.scale.server import SETTINGS, DurablePostgreSQL

#: What can be measured, in this order.
PARTS = ("fill", "size", "plans", "latency", "price", "layouts", "cluster", "purge")

#: The log that others are compared with.
SHORT = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help=f"a multiple of {IN_FLIGHT} (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--data", type=Path, help="keep the database in this directory, and use what is there")
    parser.add_argument(
        "--output", type=Path, default=Path("bench"), help="where scale.json and scale.md go (default: %(default)s)"
    )
    parser.add_argument(
        "--within", type=float, default=float("inf"), help="seconds after which the filling stops for now"
    )
    parser.add_argument(
        "--older-than", type=float, default=5.0, help="days behind which the purge deletes (default: %(default)s of 7)"
    )
    parser.add_argument(
        "--phase", type=float, default=15.0, help="seconds of each phase of the purge (default: %(default)s)"
    )
    parser.add_argument("--phases", type=int, default=5, help="phases of the purge (default: %(default)s)")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.rows <= 0 or options.rows % IN_FLIGHT:
        parser.error(f"--rows is a multiple of {IN_FLIGHT}, not {options.rows}")
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "scale.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if figures.get("rows") != options.rows:
        figures = {"rows": options.rows}
    with DurablePostgreSQL(options.data) as server, server.administering() as connection:
        figures["machine"] = _machine(connection)
        for part in (part for part in PARTS if part in parts):
            print(f"{part} ...", file=sys.stderr, flush=True)
            measured = _measure(part, server, connection, options)
            if measured is not None:
                figures[part] = measured
                file.write_text(json.dumps(figures, indent=1))
                (options.output / "scale.md").write_text(markdown(figures))
    print(markdown(figures))
    return 0


def _measure(part: str, server: DurablePostgreSQL, connection: sa.Connection, options: argparse.Namespace) -> Any:
    match part:
        case "fill":
            filled = fill(connection, server.url, "large", options.rows, within=options.within)
            print(f"{filled.rows:,} rows are there", file=sys.stderr)
            return None
        case "size":
            return _size(connection)
        case "plans":
            return planning(server.url, "large")
        case "latency":
            _make_short(server, connection)
            return latency(server.url, connection, ["large", "small"], rounds=60)
        case "price":
            _make_short(server, connection)
            compressed = {"wal_compression": "lz4"}
            return {
                f"{SHORT:,} rows": price(server, connection, "small", messages=6_000),
                f"{options.rows:,} rows": price(server, connection, "large", messages=6_000),
                f"{options.rows:,} rows, wal_compression": price(
                    server, connection, "large", messages=6_000, settings=compressed
                ),
            }
        case "layouts":
            return layouts(server, connection, messages=4_000)
        case "cluster":
            return cluster(messages=4_000, rounds=3)
        case _:
            older_than = options.older_than * 24 * 3600
            return purging(
                server.url, connection, "large", older_than=older_than, phase=options.phase, phases=options.phases
            )


def _make_short(server: DurablePostgreSQL, connection: sa.Connection) -> None:
    connection.execute(sa.text("DROP TABLE IF EXISTS small"))
    fill(connection, server.url, "small", SHORT)


def _size(connection: sa.Connection) -> dict[str, Any]:
    """Return the log as it was filled, vacuumed."""
    row = connection.execute(
        sa.text("SELECT n_live_tup, n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'large'")
    ).one()
    sizes = connection.execute(
        sa.text("SELECT pg_relation_size('large'), pg_table_size('large'), pg_total_relation_size('large')")
    ).one()
    indexes = connection.execute(
        sa.text(
            "SELECT indexrelid::regclass::text, pg_relation_size(indexrelid) FROM pg_index WHERE indrelid = 'large'::regclass"
        )
    )
    return {
        "rows": row[0],
        "updates": row[1],
        "hot": row[2] / row[1],
        "bytes": {
            "heap": sizes[0],
            "TOAST, and maps": sizes[1] - sizes[0],
            **{f"index `{name.removeprefix('large_')}`": size for name, size in indexes},
            "all": sizes[2],
        },
    }


def _machine(connection: sa.Connection) -> dict[str, Any]:
    processors = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in processors if line.startswith("model name")]
    return {
        "processors": psutil.cpu_count(),
        "processor": names[0] if names else platform.machine(),
        "memory GB": psutil.virtual_memory().total / 1e9,
        "postgresql": connection.execute(sa.text("SHOW server_version")).scalar_one().split()[0],
        "python": platform.python_version(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "settings": SETTINGS,
    }


if __name__ == "__main__":
    sys.exit(main())
