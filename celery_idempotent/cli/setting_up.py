"""The commands ``init`` and ``doctor``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import click
from celery.bin.base import CeleryCommand

from celery_idempotent.cli.opening import opened
from celery_idempotent.cli.options import as_json, duration
from celery_idempotent.cli.printing import print_
from celery_idempotent.doctor import CODES, Facts, Finding, Severity, findings, read_facts

__all__ = ["doctor", "init"]

#: The exit status when nothing but warnings was found.
_WARNED = 3


@click.command(cls=CeleryCommand)
@as_json
@click.pass_context
def init(ctx: click.Context, json_: bool) -> None:
    """Create the table of the queue log if it is missing."""
    with opened(ctx) as queue_log:
        created = queue_log.init()
        table = queue_log.settings.table
    print_(
        json_, {"table": table, "created": created}, lambda: [f"{table} {'created' if created else 'is there already'}"]
    )


@click.command(cls=CeleryCommand)
@click.option(
    "--ignore",
    metavar="CODE",
    type=click.Choice(list(CODES)),
    multiple=True,
    help="Leave out a finding that you know of, by its code. Any number of times.",
)
@click.option(
    "--consumer-timeout",
    metavar="SECONDS",
    callback=duration,
    help="RabbitMQ's consumer_timeout, which it does not tell.  [default: RabbitMQ's, 30m]",
)
@as_json
@click.pass_context
def doctor(ctx: click.Context, ignore: Sequence[str], consumer_timeout: float | None, json_: bool) -> None:
    """Look for what would break the promise: in the app's settings, the broker and the store.

    Nothing is changed, and what is away is a finding. Run it where a worker runs, and with its configuration: what it says of clocks, of
    what can be reached and of files is about this host. A setting of one queue or one worker that the app does not know is not seen.

    Ends with 0 when nothing was found, with 1 when an error was, and with 3 when nothing but warnings was.
    """
    with opened(ctx) as queue_log:
        queue_log.app.loader.import_default_modules()
        facts = read_facts(queue_log, consumer_timeout=consumer_timeout)
    found = [finding for finding in findings(facts) if finding.code not in ignore]
    errors = sum(finding.severity is Severity.ERROR for finding in found)
    data = {
        "broker": facts.broker.url,
        "store": facts.store.name,
        "tasks": len(facts.app.tasks),
        "errors": errors,
        "warnings": len(found) - errors,
        "ignored": sorted(set(ignore)),
        "findings": [
            {"severity": each.severity, **asdict(each), "stake": each.stake, "see": each.see} for each in found
        ],
    }
    print_(json_, data, lambda: _report(facts, found, errors))
    if found:
        raise click.exceptions.Exit(1 if errors else _WARNED)


def _report(facts: Facts, found: Sequence[Finding], errors: int) -> Iterable[str]:
    """The findings for people."""
    yield f"broker {facts.broker.url}, store {facts.store.name}, guarded tasks: {len(facts.app.tasks)}"
    for each in found:
        yield ""
        yield f"{each.severity} {each.code}: {each.what}"
        yield f"  at stake  {each.stake}"
        yield f"  set       {each.remedy}"
        if each.tasks:
            yield f"  tasks     {_some(each.tasks)}"
        yield f"  see       {each.see}"
    yield ""
    yield f"errors: {errors}, warnings: {len(found) - errors}" if found else "nothing was found"


def _some(names: Sequence[str], at_most: int = 10) -> str:
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")
