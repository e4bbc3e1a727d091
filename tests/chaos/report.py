"""What a run of chaos came to, for a person: a table, and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.audit import percentile
from tests.chaos.plan import KILLS, LEASE
from tests.chaos.runner import Chaos

__all__ = ["figures", "plot", "table"]


def figures(chaos: Chaos) -> dict[str, Any]:
    """Return the figures of a run, by the words that a table has for them."""
    audit, faults = chaos.audit, chaos.faults
    kills = sum(faults[kind] for kind in KILLS)
    seconds = audit.seconds_to_recovery(with_outages=False)
    everything = audit.seconds_to_recovery(with_outages=True)
    return {
        "tasks sent": audit.sent,
        "bodies run": audit.bodies,
        "processes killed": kills,
        "other faults": sum(faults.values()) - kills,
        "workers that gave up": chaos.gave_up,
        "lost": len(audit.lost),
        "committed effects": audit.effects,
        "effects lost": len(audit.effects_lost),
        "effects doubled": len(audit.effects_doubled),
        "orders committed": audit.orders,
        "orders rolled back": sum(sending.rolled_back for sending in chaos.plan.sendings),
        "orders lost": len(audit.orders_lost),
        "orders doubled": len(audit.orders_doubled),
        "orders rolled back, and sent": len(audit.unordered),
        "messages left to the relay": chaos.relayed,
        "run again, owner died": len(audit.again),
        "run again, transaction gave way": len(audit.anew),
        "run again, no death": len(audit.doubled),
        "two at once": len(audit.concurrent),
        "two at once, paused": len(audit.zombies),
        "zombies refused": chaos.refused,
        "taken for poison": len(audit.poisoned),
        "revoked or expired, and not run": len(audit.called_off),
        "at most once: abandoned": len(audit.abandoned),
        "at most once: run twice": len(audit.overrun),
        "results not readable": len(audit.unreadable),
        "results not stored, owner died": len(audit.unstored),
        "rows not done": len(audit.unfinished),
        "recoveries": len(everything),
        "recovery p50, s": _at(seconds, 50),
        "recovery p99, s": _at(seconds, 99),
        "recovery max, s": _at(seconds, 100),
        "... with outages, max, s": _at(everything, 100),
        "seconds": round(chaos.seconds, 1),
    }


def _at(values: Sequence[float], percent: int) -> float | None:
    if not values:
        return None
    return round(values[-1] if percent == 100 else percentile(values, percent), 2)


def table(runs: Sequence[Chaos]) -> str:
    """Return a column for each run."""
    heads = [chaos.variant for chaos in runs], [f"{chaos.store}, {chaos.broker}" for chaos in runs]
    columns = [figures(chaos) for chaos in runs]
    width = max(len(head) for line in heads for head in line) + 2
    lines = [f"{'':32}" + "".join(f"{head:>{width}}" for head in line) for line in heads]
    for name in columns[0]:
        values = ("-" if column[name] is None else f"{column[name]:,}" for column in columns)
        lines.append(f"{name:32}" + "".join(f"{value:>{width}}" for value in values))
    return "\n".join(lines)


def write(runs: Sequence[Chaos], path: Path) -> None:
    """Write the figures as JSON, with all that was found wanting."""
    told: list[Mapping[str, Any]] = [
        {
            "variant": chaos.variant,
            "store": chaos.store,
            "broker": chaos.broker,
            "seed": chaos.plan.seed,
            "figures": figures(chaos),
            "faults": dict(chaos.faults),
            "violations": chaos.audit.violations(),
        }
        for chaos in runs
    ]
    path.write_text(json.dumps(told, indent=2) + "\n")


def plot(runs: Sequence[Chaos], path: Path) -> None:
    """Bodies per second, the kills, and how long each body that died waited for its next run."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2 * len(runs), 1, figsize=(11, 3.6 * len(runs)), height_ratios=[2, 1] * len(runs), squeeze=False
    )
    for place, chaos in enumerate(runs):
        above, below = axes[2 * place][0], axes[2 * place + 1][0]
        ends = [run.end - chaos.began for run in chaos.runs if run.end is not None]
        above.hist(ends, bins=max(int(chaos.seconds), 1), color="#4c78a8")
        above.set_ylabel("bodies ended / s")
        above.set_title(
            f"{chaos.variant}, {chaos.store} and {chaos.broker}: {chaos.audit.sent:,} tasks, "
            f"{sum(chaos.faults[kind] for kind in KILLS)} kills, {len(chaos.audit.lost)} lost, "
            f"{len(chaos.audit.doubled)} run again without a death"
        )
        for done in chaos.done:
            deadly = done.kind in KILLS
            lasting = done.until - done.at > 0.3 and not deadly
            if lasting:
                above.axvspan(done.at - chaos.began, done.until - chaos.began, color="#f2cf5b", alpha=0.5)
            elif deadly:
                above.axvline(done.at - chaos.began, color="#e45756", linewidth=0.8)
        below.axhline(LEASE, color="grey", linestyle="dashed", linewidth=0.8)
        for outage, colour, label in (
            (False, "#54a24b", "killed, run again"),
            (True, "#f58518", "... with a server away"),
        ):
            found = [recovery for recovery in chaos.audit.recoveries if recovery.outage is outage]
            below.scatter(
                [recovery.died - chaos.began for recovery in found],
                [recovery.seconds for recovery in found],
                s=12,
                color=colour,
                label=label,
            )
        below.set_ylabel("s to recovery")
        below.set_xlabel("s")
        below.legend(loc="upper right", fontsize="small")
        below.set_xlim(above.get_xlim())
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
