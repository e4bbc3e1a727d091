"""The commands that change what an operator chooses: ``requeue``, ``forget``, ``purge``."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from celery.bin.base import CeleryCommand

from celery_idempotent.cli.opening import opened
from celery_idempotent.cli.options import Chosen, as_json, choose, confirmed, dry_run, duration, limit, yes
from celery_idempotent.cli.printing import print_, printable, table
from celery_idempotent.cli.viewing import listing, not_there, record_of, rows_of
from celery_idempotent.core.records import FORGOTTEN, MessageKey, ProcessedStatus, Row, Status
from celery_idempotent.errors import RefusedError
from celery_idempotent.maintenance.operations import unfinished
from celery_idempotent.maintenance.purge import purge as purge_rows
from celery_idempotent.maintenance.purge import purgeable
from celery_idempotent.maintenance.requeue import obstacle
from celery_idempotent.producer.relay import relay
from celery_idempotent.queue_log import QueueLog

__all__ = ["forget", "purge", "requeue"]

#: Seconds of purging between two reports of progress.
_STRIDE = 2.0


@click.command(cls=CeleryCommand)
@click.argument("message_ids", metavar="[MESSAGE_ID]...", nargs=-1)
@choose
@limit(1000, "At most this many, the oldest first.")
@dry_run
@yes
@as_json
@click.pass_context
def requeue(
    ctx: click.Context,
    /,
    message_ids: Sequence[str],
    limit: int,
    dry_run: bool,
    yes: bool,
    json_: bool,
    **choice: Any,
) -> None:
    """Publish failed and abandoned messages again from their rows.

    Name them by MESSAGE_ID, or choose them: --task '*' --error 'ConnectionError*' --newer-than 2h. Each starts over at once, with all its retries,
    under its old ids. So its first AsyncResult shows the new outcome, and a chain continues. Calls that its body made are not made twice; if they
    failed, requeue them too. A message that was revoked or had expired gets a new task id.

    Each task has ids of its own. If several tasks have a message of the id, MESSAGE_ID means all of them, and --task one.

    A message that is requeued is in the queue log until the broker has it: if that is down, workers publish it later.
    """
    chosen = Chosen(**choice)
    with opened(ctx) as queue_log:
        queue_log.app.loader.import_default_modules()  # a message whose task is unknown cannot be published
        rows, missing = _named_or_chosen(
            queue_log,
            message_ids,
            chosen,
            status=Status.DONE,
            processed_status=ProcessedStatus.FAILURE,
            limit=limit,
        )
        refused = [(row.key, reason) for row in rows if (reason := obstacle(row))]
        rows = [row for row in rows if not obstacle(row)]
        renamed: dict[MessageKey, str] = {}
        if rows and not dry_run:
            confirmed(_question("requeue", rows), yes=yes)
            rows = _requeue(queue_log, rows, refused, renamed)
            relay(queue_log, at_most=math.inf)
    records = [{**record_of(row), "task_id": renamed.get(row.key, row.task_id)} for row in rows]
    _report("requeue", "requeued", records, refused, missing, dry_run=dry_run, json_=json_)
    for key, task_id in renamed.items():
        click.echo(
            f"{_name(key)} had been discarded, which workers remember by its task id: that is now {task_id}", err=True
        )
    _end(refused, missing, full=len(records) >= limit and not message_ids, limit=limit, json_=json_)


def _requeue(
    queue_log: QueueLog, rows: list[Row], refused: list[tuple[MessageKey, str]], renamed: dict[MessageKey, str]
) -> list[Row]:
    """Requeue rows; return those that wait again."""
    again: list[Row] = []
    with _progress("requeueing", rows) as each:
        for row in each:
            try:
                done = queue_log.requeue(row, publish=False)  # all of them together, afterwards
            except RefusedError as error:
                refused.append((row.key, str(error.reason)))
                continue
            again.append(row)
            if done.renamed:
                renamed[row.key] = done.task_id
    return again


@click.command(cls=CeleryCommand)
@click.argument("message_ids", metavar="[MESSAGE_ID]...", nargs=-1)
@choose
@click.option("--status", type=click.Choice([str(status) for status in Status]), help="Only rows in this status.")
@limit(1000, "At most this many, the oldest first.")
@click.option("--force", is_flag=True, help="Also messages that wait or run.")
@dry_run
@yes
@as_json
@click.pass_context
def forget(
    ctx: click.Context,
    /,
    message_ids: Sequence[str],
    status: str | None,
    limit: int,
    force: bool,
    dry_run: bool,
    yes: bool,
    json_: bool,
    **choice: Any,
) -> None:
    """Empty rows, so that their message ids are free.

    Each task has ids of its own. If several tasks have a message of the id, MESSAGE_ID means all of them, and --task one.

    The next message under the id is new, whatever its arguments. Arguments, result and error of the old one are gone; what is left of its
    row is its fencing token, until it is purged.

    A copy that the broker still has will run as a new message. So messages that wait or run are forgotten only with --force. One that waits
    will still run, unless the broker has lost it. One that runs is not stopped, and its outcome is refused.

    `celery purge` alone does not last, because recovery publishes what waits in the log. After it: forget --queue NAME --status pending --force.
    """
    chosen = Chosen(**choice)
    if status is not None:
        chosen["status"] = status
    with opened(ctx) as queue_log:
        rows, missing = _named_or_chosen(queue_log, message_ids, chosen, limit=limit)
        rows = [row for row in rows if row.error != FORGOTTEN]
        refused = [] if force else [(row.key, f"{why}; see --force") for row in rows if (why := unfinished(row))]
        rows = [row for row in rows if force or not unfinished(row)]
        if rows and not dry_run:
            confirmed(_question("forget", rows), yes=yes)
            rows = _forget(queue_log, rows, refused, force=force)
    _report("forget", "forgotten", [record_of(row) for row in rows], refused, missing, dry_run=dry_run, json_=json_)
    _end(refused, missing, full=len(rows) >= limit and not message_ids, limit=limit, json_=json_)


def _forget(queue_log: QueueLog, rows: list[Row], refused: list[tuple[MessageKey, str]], *, force: bool) -> list[Row]:
    """Forget rows; return those that were forgotten."""
    forgotten: list[Row] = []
    with _progress("forgetting", rows) as each:
        for row in each:
            try:
                if queue_log.forget(row, force=force):
                    forgotten.append(row)
            except RefusedError as error:
                refused.append((row.key, str(error.reason)))
    return forgotten


@click.command(cls=CeleryCommand)
@click.option(
    "--older-than",
    metavar="SECONDS",
    callback=duration,
    help="Only messages that have been done for longer, e.g. 7d.  [default: idempotent_retention]",
)
@click.option("--task", "task_name", help="Only this task; * and ? are wildcards.")
@click.option(
    "--processed-status",
    type=click.Choice([str(status) for status in ProcessedStatus]),
    help="Only messages with this outcome. With failure, --older-than applies to failures too.",
)
@dry_run
@yes
@as_json
@click.pass_context
def purge(
    ctx: click.Context,
    older_than: float | None,
    task_name: str | None,
    processed_status: str | None,
    dry_run: bool,
    yes: bool,
    json_: bool,
) -> None:
    """Delete the rows of messages that are done.

    Workers do this by themselves. Without its row, a message is forgotten: a late copy of it would run, and its id may be used again.
    A row stays while unique_for keeps its id taken. Waiting messages are not touched: this is not `celery purge`. A failure that can be
    requeued is kept for idempotent_failure_retention, unless --processed-status failure --older-than says otherwise.

    It asks before it deletes, and requires --yes if there is no terminal.
    """
    with opened(ctx) as queue_log:
        chosen: dict[str, Any] = {
            "older_than": older_than,
            "task_name": task_name,
            "processed_status": None if processed_status is None else ProcessedStatus(processed_status),
        }
        purged = purgeable(queue_log, **chosen) if dry_run or not yes else 0
        if not dry_run:
            if purged or not sys.stdin.isatty():
                seconds = queue_log.settings.retention if older_than is None else older_than
                confirmed(f"Delete {purged} rows of messages that were done {seconds:g} s ago or earlier?", yes=yes)
            purged = _purge(queue_log, chosen)
    would = {"dry_run": True} if dry_run else {}
    print_(json_, {**would, "purged": purged}, lambda: [f"{'would purge' if dry_run else 'purged'} {purged}"])


def _purge(queue_log: QueueLog, chosen: dict[str, Any]) -> int:
    """Purge to the end, and report progress from time to time."""
    if not sys.stderr.isatty():
        return purge_rows(queue_log, **chosen, within=math.inf)
    length = purgeable(queue_log, **chosen)
    purged = 0
    with click.progressbar(length=length, label="purging", file=sys.stderr) as bar:
        while True:
            until = time.monotonic() + _STRIDE
            deleted = purge_rows(queue_log, **chosen, within=_STRIDE)
            purged += deleted
            bar.update(deleted)
            if time.monotonic() < until:  # it ended before its time was over, so nothing is left
                return purged


# -- what requeue and forget have in common ------------------------------------------------------------------------------


def _named_or_chosen(
    queue_log: QueueLog, message_ids: Sequence[str], chosen: Chosen, **conditions: Any
) -> tuple[list[Row], list[str]]:
    """Return the rows that a command applies to, and the given ids that have no row."""
    others = set(chosen) - {"task"}
    if message_ids and others:
        raise click.UsageError(
            f"give message ids or filters, not both: leave out --{min(others).replace('_', '-')}, or the ids"
        )
    if not message_ids and not chosen:
        raise click.UsageError("no messages given: name their ids, or choose them, e.g. by --task '*'")
    if not message_ids:
        return queue_log.rows(**{**chosen, **conditions}, oldest_first=True), []
    task_name = chosen.get("task")
    if task_name is not None and set("*?") & set(task_name):
        raise click.UsageError("with a message id, --task must be the name of a task, without wildcards")
    found = {message_id: rows_of(queue_log, message_id, task_name) for message_id in dict.fromkeys(message_ids)}
    missing = [not_there(message_id, task_name) for message_id, rows in found.items() if not rows]
    for message_id, rows in found.items():
        if len(rows) > 1:
            names = ", ".join(row.key.task_name for row in rows)
            click.echo(
                printable(f"{message_id} is the id of messages of several tasks ({names}); --task NAME chooses one"),
                err=True,
            )
    return [row for rows in found.values() for row in rows], missing


def _question(verb: str, rows: Sequence[Row]) -> str:
    what = _name(rows[0].key) if len(rows) == 1 else f"{len(rows)} messages"
    return f"{verb.capitalize()} {what}?"


def _name(key: MessageKey) -> str:
    return printable(str(key))


def _report(
    verb: str,
    done: str,
    records: list[dict[str, Any]],
    refused: Sequence[tuple[MessageKey, str]],
    missing: Sequence[str],
    *,
    dry_run: bool,
    json_: bool,
) -> None:
    """Print what was done, and what was not."""

    def lines() -> Iterable[str]:
        if not dry_run:
            return [f"{done} {len(records)}"]
        return [*(table(*listing(records)) if records else ()), f"would {verb} {len(records)}"]

    data = {
        "dry_run": dry_run,
        done: [{name: record[name] for name in ("message_id", "task_name", "task_id")} for record in records],
        "refused": [
            {"message_id": key.message_id, "task_name": key.task_name, "reason": reason} for key, reason in refused
        ],
        "missing": list(missing),
    }
    print_(json_, data, lines)


def _end(
    refused: Sequence[tuple[MessageKey, str]], missing: Sequence[str], *, full: bool, limit: int, json_: bool
) -> None:
    """Print what was not done, and exit with its status."""
    if full and not json_:
        click.echo(f"these were the oldest {limit}; there may be more: run it again, or see --limit", err=True)
    for text in (*missing, *(f"{_name(key)} stays as it is: {reason}" for key, reason in refused)):
        click.echo(text, err=True)
    if refused or missing:
        raise click.exceptions.Exit(1)


@contextmanager
def _progress(label: str, rows: Sequence[Row]) -> Iterator[Iterable[Row]]:
    """Yield an iterator over the rows, with a progress bar in a terminal."""
    if len(rows) == 1 or not sys.stderr.isatty():
        yield rows
        return
    with click.progressbar(rows, label=label, file=sys.stderr) as bar:
        yield bar
