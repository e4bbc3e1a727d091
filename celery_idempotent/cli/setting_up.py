"""The commands ``init`` and ``doctor``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import click
from celery.bin.base import CeleryCommand

from celery_idempotent.cli.opening import opened
from celery_idempotent.cli.options import as_json, confirmed, dry_run, duration, yes
from celery_idempotent.cli.printing import print_
from celery_idempotent.core.records import Change
from celery_idempotent.doctor import CODES, Facts, Finding, Severity, findings, read_facts
from celery_idempotent.queue_log import QueueLog

__all__ = ["doctor", "init"]

#: The databases that `init --sql` has the words of.
_DIALECTS = ("postgresql", "mariadb", "mysql", "sqlite")

#: The exit status when nothing but warnings was found.
_WARNED = 3


@click.command(cls=CeleryCommand)
@dry_run
@click.option(
    "--sql",
    metavar="DIALECT",
    type=click.Choice(list(_DIALECTS)),
    help=f"Print the statements for a database ({', '.join(_DIALECTS)}), and connect to none.",
)
@click.option(
    "--since",
    metavar="VERSION",
    type=click.IntRange(min=0),
    help="With --sql: only what a table of this version lacks.  [default: the whole table]",
)
@yes
@as_json
@click.pass_context
def init(ctx: click.Context, dry_run: bool, sql: str | None, since: int | None, yes: bool, json_: bool) -> None:
    """Create the table of the queue log if it is missing, or take one of an older version to this one.

    A table that is there is changed beside those who use it: indexes are built while workers write, and workers of the version before go on.
    Do it before the first process of the new version starts. It asks before it changes a table that is there, and creates one that is missing
    without asking. Any number may run at once; one that was broken off is taken up by the next.
    """
    if since is not None and sql is None:
        raise click.UsageError("--since is about --sql: of a database it can be seen")
    with opened(ctx) as queue_log:
        table = queue_log.settings.table
        if sql is not None:
            changes = _written(table, sql, since or 0)
        else:
            changes = list(queue_log.store.outstanding())
            if not dry_run:
                _change(queue_log, changes, yes=yes)
    if sql is not None or dry_run:
        records = [{"what": change.what, "statement": change.statement} for change in changes]
        print_(json_, {"table": table, "dry_run": True, "changes": records}, lambda: _script(table, changes))
        return
    altered = any(change.alters for change in changes)
    data = {
        "table": table,
        "created": bool(changes) and not altered,
        "changes": [change.what for change in changes],
    }
    done = ("brought up to this version" if altered else "created") if changes else "is there already"
    print_(json_, data, lambda: [f"{table} {done}"])


def _change(queue_log: QueueLog, changes: Sequence[Change], *, yes: bool) -> None:
    """Make the changes, with consent where there is something to lose time by."""
    if any(change.alters for change in changes):
        for change in changes:
            click.echo(f"to do: {change.what}", err=True)
        confirmed(f"Change the table {queue_log.settings.table}?", yes=yes)
        queue_log.store.init(before=lambda change: click.echo(f"{change.what} ...", err=True))
    elif changes:
        queue_log.store.init()


def _written(table: str, dialect: str, since: int) -> list[Change]:
    """Return the changes to a table of a version, for a database that is not asked."""
    from celery_idempotent.stores.sql.writing import changes_between  # SQLAlchemy, which most commands do without

    namespace, _, name = table.rpartition(".")
    return changes_between(since, dialect=dialect, name=name, schema=namespace or None)


def _script(table: str, changes: Sequence[Change]) -> Iterable[str]:
    """Yield the statements, to be read or to be run."""
    if not changes:
        yield f"-- {table} is of this version"
    for change in changes:
        yield f"-- {change.what}"
        yield from f"{change.statement};".splitlines() if change.statement else ()


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
    """Yield the findings for people."""
    file = "" if facts.store.relative_file is None else f" at {facts.store.relative_file}"
    yield f"broker {facts.broker.url}, store {facts.store.name}{file}, guarded tasks: {len(facts.app.tasks)}"
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
