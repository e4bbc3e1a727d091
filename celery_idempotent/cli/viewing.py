"""The commands that only read: ``stats``, ``list``, ``show``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click
from celery.bin.base import CeleryCommand

from celery_idempotent.cli.opening import opened
from celery_idempotent.cli.options import Chosen, as_json, choose, limit
from celery_idempotent.cli.printing import print_, sheets, table
from celery_idempotent.core.records import ProcessedStatus, Row, Status
from celery_idempotent.message.contents import contents_of
from celery_idempotent.queue_log import QueueLog

__all__ = ["LISTED", "list_", "record_of", "rows_of", "show", "stats"]

#: Columns that `list` prints; `show` prints all.
LISTED = (
    "message_id",
    "task_name",
    "status",
    "processed_status",
    "attempt",
    "token",
    "duplicates",
    "created_timestamp",
)

#: How many characters of an error `list` prints.
_ERROR = 60


@click.command(cls=CeleryCommand)
@as_json
@click.pass_context
def stats(ctx: click.Context, json_: bool) -> None:
    """Count the rows by task and status, and the copies that were skipped."""
    with opened(ctx) as queue_log:
        if not queue_log.settings.enabled:
            click.echo("the guard is off: idempotent_enabled is False", err=True)
        counts = queue_log.store.counts()
    records = [
        {
            "task_name": count.task_name,
            "status": count.status,
            "processed_status": count.processed_status,
            "rows": count.rows,
            "duplicates": count.duplicates,
        }
        for count in counts
    ]
    print_(json_, records, lambda: table(records, ("task_name", "status", "processed_status", "rows", "duplicates")))


@click.command(name="list", cls=CeleryCommand)
@choose
@click.option("--status", type=click.Choice([str(status) for status in Status]), help="Only rows in this status.")
@click.option(
    "--processed-status",
    type=click.Choice([str(status) for status in ProcessedStatus]),
    help="Only messages with this outcome.",
)
@click.option("--oldest", is_flag=True, help="The oldest first.")
@limit(100, "At most this many, newest first.")
@as_json
@click.pass_context
def list_(
    ctx: click.Context,
    /,
    status: str | None,
    processed_status: str | None,
    oldest: bool,
    limit: int,
    json_: bool,
    **choice: Any,
) -> None:
    """List messages, newest first. Their arguments and results are not read."""
    where = Chosen(**choice, status=status, processed_status=processed_status)
    with opened(ctx) as queue_log:
        records = [record_of(row) for row in queue_log.rows(**where, limit=limit, oldest_first=oldest)]
    print_(json_, records, lambda: table(*listing(records)))
    if len(records) == limit and not json_:
        which = "oldest" if oldest else "newest"
        click.echo(f"these are the {which} {limit}; there may be more: see --limit", err=True)


def listing(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return the records and columns of a table; if there are errors, with their beginnings."""
    if not any(record["error"] for record in records):
        return records, LISTED
    short = [{**record, "error": _shortened(record["error"])} for record in records]
    return short, (*LISTED, "error")


def _shortened(error: str | None) -> str | None:
    return error if error is None or len(error) <= _ERROR else error[: _ERROR - 3] + "..."


@click.command(cls=CeleryCommand)
@click.argument("message_id")
@click.option("--task", "task_name", help="Only this task's message, if several tasks use the id.")
@click.option(
    "--arguments", is_flag=True, help="Show the arguments, the result and the steps too; they may contain secrets."
)
@as_json
@click.pass_context
def show(ctx: click.Context, message_id: str, task_name: str | None, arguments: bool, json_: bool) -> None:
    """Show the message MESSAGE_ID.

    Arguments, results and steps are shown only on demand, because output ends up in terminals, tickets and logs. Values that idempotent_redact names
    are masked even then. A call's argsrepr and kwargsrepr, which Celery's own logs show, are always shown.
    """
    with opened(ctx) as queue_log:
        rows = rows_of(queue_log, message_id, task_name)
        masked = queue_log.settings.redact if arguments else ()
        if masked:
            queue_log.app.loader.import_default_modules()  # arguments of an unknown task have no names
        contents = [contents_of(queue_log.app, row, masked) for row in rows]
    shown = contents if arguments else [_redacted(each, json_=json_) for each in contents]
    records = [{**record_of(row), **each} for row, each in zip(rows, shown, strict=True)]
    if not records:
        raise click.ClickException(not_there(message_id, task_name))
    print_(json_, records, lambda: sheets(records))


def not_there(message_id: str, task_name: str | None) -> str:
    """Return the text for a message that has no row."""
    return f"no message {message_id!r}" + (f" of task {task_name}" if task_name else "")


def rows_of(queue_log: QueueLog, message_id: str, task_name: str | None) -> list[Row]:
    """Return the rows of a message id, of one task or of all that use it, with their messages."""
    names = [task_name] if task_name else _tasks_of(queue_log, message_id)
    return [row for name in names if (row := queue_log.find_id(name, message_id)) is not None]


def _tasks_of(queue_log: QueueLog, message_id: str) -> list[str]:
    """Return the tasks that use a message id."""
    if "*" in message_id or "?" in message_id:  # a filter would read these as wildcards
        return sorted({count.task_name for count in queue_log.store.counts()})
    return sorted({row.key.task_name for row in queue_log.rows(message_id=message_id, limit=1000)})


def record_of(row: Row) -> dict[str, Any]:
    """Return a row as plain data, without its encoded message, result and steps."""
    flat = {"message_id": row.key.message_id, "task_name": row.key.task_name}
    kept = (field.name for field in fields(Row) if field.name not in ("key", "message", "result", "steps", "read_at"))
    return {**flat, **{name: getattr(row, name) for name in kept}}


def _redacted(contents: dict[str, Any], *, json_: bool) -> dict[str, Any]:
    """Return the contents without values; for people, with a note that there are some."""
    secret = [name for name in ("args", "kwargs", "result", "steps") if name in contents]
    kept = {name: value for name, value in contents.items() if name not in secret}
    return kept if json_ else {**kept, **dict.fromkeys(secret, "see --arguments")}
