"""The commands ``init`` and ``doctor``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import click
from celery.bin.base import CeleryCommand

from celery_idempotent.cli.opening import opened
from celery_idempotent.cli.options import as_json, confirmed, dry_run, duration, yes
from celery_idempotent.cli.printing import print_
from celery_idempotent.core.store import Change
from celery_idempotent.doctor import CODES, Facts, Finding, Severity, findings, read_facts
from celery_idempotent.queue_log import QueueLog

__all__ = ["doctor", "init"]

#: The databases that `init --sql` can write statements for.
_DIALECTS = ("postgresql", "mariadb", "mysql", "sqlite")

#: The exit status if only warnings were found.
_WARNED = 3


@click.command(cls=CeleryCommand)
@dry_run
@click.option(
    "--sql",
    metavar="DIALECT",
    type=click.Choice(list(_DIALECTS)),
    help=f"Print the statements for a database ({', '.join(_DIALECTS)}), without connecting to any.",
)
@click.option(
    "--since",
    metavar="VERSION",
    type=click.IntRange(min=0),
    help="With --sql: only the changes to a table of this version.  [default: the whole table]",
)
@yes
@as_json
@click.pass_context
def init(ctx: click.Context, dry_run: bool, sql: str | None, since: int | None, yes: bool, json_: bool) -> None:
    """Create the table of the queue log if it is missing, or upgrade one of an older version.

    An existing table is changed online: indexes are built while workers write, and workers of the version before continue. Run it before
    the first process of the new version starts. It asks before it changes an existing table, and creates a missing one without asking. Any
    number may run at once; if one is interrupted, the next continues.
    """
    if since is not None and sql is None:
        raise click.UsageError("--since requires --sql: of a database, init reads the version itself")
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
    done = ("upgraded" if altered else "created") if changes else "is up to date"
    print_(json_, data, lambda: [f"{table} {done}"])


def _change(queue_log: QueueLog, changes: Sequence[Change], *, yes: bool) -> None:
    """Make the changes; ask first if they change an existing table."""
    if any(change.alters for change in changes):
        for change in changes:
            click.echo(f"to do: {change.what}", err=True)
        confirmed(f"Change the table {queue_log.settings.table}?", yes=yes)
        queue_log.store.init(before=lambda change: click.echo(f"{change.what} ...", err=True))
    elif changes:
        queue_log.store.init()


def _written(table: str, dialect: str, since: int) -> list[Change]:
    """Return the changes to a table of version ``since``, without connecting to a database."""
    from celery_idempotent.stores.sql.writing import changes_between  # needs SQLAlchemy, unlike most commands

    namespace, _, name = table.rpartition(".")
    return changes_between(since, dialect=dialect, name=name, schema=namespace or None)


def _script(table: str, changes: Sequence[Change]) -> Iterable[str]:
    """Yield the statements, to be read or to be run."""
    if not changes:
        yield f"-- {table} has this version already"
    for change in changes:
        yield f"-- {change.what}"
        yield from f"{change.statement};".splitlines() if change.statement else ()


@click.command(cls=CeleryCommand)
@click.option(
    "--ignore",
    metavar="CODE",
    type=click.Choice(list(CODES)),
    multiple=True,
    help="Leave out a finding that you accept, by its code. Can be repeated.",
)
@click.option(
    "--consumer-timeout",
    metavar="SECONDS",
    callback=duration,
    help="RabbitMQ's consumer_timeout, which clients cannot read.  [default: RabbitMQ's, 30m]",
)
@as_json
@click.pass_context
def doctor(ctx: click.Context, ignore: Sequence[str], consumer_timeout: float | None, json_: bool) -> None:
    """Look for settings of the app, the broker and the store that would break the promise.

    It changes nothing. A server that is down is a finding. Run it on a worker's host, with the worker's configuration: clocks, files and
    reachable servers are checked from this host. It does not see settings of a queue or a worker that the app does not know.

    Exit status: 0 if nothing was found, 1 if an error was found, 3 if only warnings were found.
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
