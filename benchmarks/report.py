"""What a run came to, for a person."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.figures import Round, ratios, spread

__all__ = ["table"]


def table(rounds: Sequence[Round], subjects: Sequence[str], base: str) -> list[str]:
    """A line for each subject: its rate, and its ratio to the base's."""
    lines = [f"{'':18}{'per second':>12}{'ratio':>8}{'spread':>16}{'cpu, ms':>10}   of that"]
    for name in subjects:
        found = [round_[name] for round_ in rounds if name in round_]
        if not found:
            continue
        rate = spread([figures["per second"] for figures in found])
        ratio = spread(ratios(rounds, "per second", name, base))
        assert rate is not None
        cpu = {
            key.removeprefix("cpu "): spread([figures[key] for figures in found])
            for key in found[0]
            if key.startswith("cpu")
        }
        parts = ", ".join(f"{key} {value.median:.2f}" for key, value in cpu.items() if key != "cpu" and value)
        shown = f"{ratio.median:8.2f}{f'{ratio.low:.2f}..{ratio.high:.2f}':>16}" if ratio else f"{'-':>8}{'-':>16}"
        total = cpu["cpu"]
        assert total is not None
        lines.append(f"{name:18}{rate.median:12,.0f}{shown}{total.median:10.2f}   {parts}")
    return lines
