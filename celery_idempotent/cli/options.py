"""Options that several commands share: durations, JSON, a choice of messages, consent."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = ["Chosen", "as_json", "choose", "confirmed", "dry_run", "duration", "limit", "yes"]

Command = TypeVar("Command", bound=Callable[..., Any])

#: Units of a duration, in seconds.
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def duration(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Return an option's duration in seconds; it may be given with a unit."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) ?([smhdw]?)", value, re.ASCII)
    seconds = float(found[1]) * _UNITS[found[2]] if found else math.nan
    if not math.isfinite(seconds):
        raise click.BadParameter(
            f"{value!r} is not a duration: give seconds, 0 or more, or a number with s, m, h, d or w after it, like 7d",
            ctx,
            param,
        )
    return seconds


as_json = click.option("--json", "json_", is_flag=True, help="Print JSON, for programs.")
dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
yes = click.option("--yes", "-y", is_flag=True, help="Do not ask; required if there is no terminal.")


def limit(default: int, help_: str) -> Callable[[Command], Command]:
    """Return the option that limits the number of messages."""
    return click.option("--limit", type=click.IntRange(min=1), default=default, show_default=True, help=help_)


_CHOICE = (
    click.option("--task", help="Only this task; * and ? are wildcards."),
    click.option("--message-id", help="Only this message id; * and ? are wildcards."),
    click.option("--queue", help="Only messages routed to this queue; * and ? are wildcards."),
    click.option("--error", help="Only messages that ended with this error: its type and text; * and ? are wildcards."),
    click.option(
        "--older-than",
        metavar="SECONDS",
        callback=duration,
        help="Only messages that were done longer ago, e.g. 2h; if they are not done, recorded longer ago.",
    ),
    click.option("--newer-than", metavar="SECONDS", callback=duration, help="Only messages of less than this age."),
)


def choose(command: Command) -> Command:
    """Add the options that choose messages; :class:`Chosen` takes them."""
    for option in reversed(_CHOICE):
        command = option(command)
    return command


class Chosen(dict[str, Any]):
    """The options of :func:`choose` that were given, by the names that ``queue_log.rows`` has for them."""

    def __init__(self, **given: Any) -> None:
        super().__init__({name: value for name, value in given.items() if value is not None})


def confirmed(question: str, *, yes: bool) -> None:
    """Ask in a terminal whether to continue.

    Raises:
        click.Abort: The answer was no.
        click.UsageError: Stdin is not a terminal.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(
            "confirmation required, but stdin is not a terminal: check with --dry-run, then pass --yes"
        )
    click.confirm(question, abort=True, err=True)
