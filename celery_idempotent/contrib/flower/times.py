"""Format times for people: ``3 min ago``, with the exact time in UTC."""

from __future__ import annotations

from datetime import UTC, datetime

from tornado.escape import xhtml_escape

__all__ = ["ago", "span"]

_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def span(seconds: float) -> str:
    """Return a duration in its largest unit, with the next unit if that matters: ``42 s``, ``12 min``, ``3 h 5 min``, ``2 d``."""
    left = max(0, round(seconds))
    for index, (unit, length) in enumerate(_UNITS):
        if left >= length:
            number, rest = divmod(left, length)
            if number >= 10 or index + 1 == len(_UNITS) or rest < _UNITS[index + 1][1]:
                return f"{number} {unit}"
            smaller, size = _UNITS[index + 1]
            return f"{number} {unit} {rest // size} {smaller}"
    return "0 s"


def ago(moment: datetime | float | None, now: datetime) -> str:
    """Return HTML that says how far a time is from now, with the exact time as a tooltip.

    Args:
        moment: A time, or seconds since the epoch; ``None`` becomes a dash.
        now: The current time, by the same clock.
    """
    if moment is None:
        return '<span class="ql-none">&ndash;</span>'
    moment = moment if isinstance(moment, datetime) else datetime.fromtimestamp(moment, UTC)
    seconds = (now - moment).total_seconds()
    text = "now" if abs(seconds) < 1 else f"{span(seconds)} ago" if seconds > 0 else f"in {span(-seconds)}"
    exact = moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f'<time datetime="{moment.astimezone(UTC).isoformat()}" title="{xhtml_escape(exact)}">{text}</time>'
