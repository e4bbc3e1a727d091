"""The command line: ``celery -A proj idempotent``.

Text for people, ``--json`` for programs. Exit status 0: done; 1: not found, or the store could not be asked; 2: wrong usage or
configuration.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import date, datetime, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from unicodedata import combining, east_asian_width
from uuid import UUID

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from celery_idempotent.errors import ConfigurationError, StoreError
from celery_idempotent.queue_log import QueueLog
from celery_idempotent.records import MessageKey, ProcessedStatus, Row, RowFilter, Status
from celery_idempotent.serialization import UndecodableError, decode_message, decode_result
from celery_idempotent.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery import Celery

__all__ = ["idempotent"]

#: Columns of a row as they are listed; the rest is shown by `show`.
_LISTED = (
    "message_id",
    "task_name",
    "status",
    "processed_status",
    "attempt",
    "token",
    "duplicates",
    "created_timestamp",
)

as_json = click.option("--json", "json_", is_flag=True, help="Print JSON, for programs.")


@click.group(name="idempotent")
@click.pass_context
@handle_preload_options  # type: ignore[untyped-decorator]
def idempotent(ctx: click.Context) -> None:
    """See and set up the queue log of an app."""


@idempotent.command(cls=CeleryCommand)
@as_json
@click.pass_context
def init(ctx: click.Context, json_: bool) -> None:
    """Create the table of the queue log if it is missing."""
    with _queue_log(ctx) as queue_log:
        created = queue_log.init()
        table = queue_log.settings.table
    _print(
        json_, {"table": table, "created": created}, lambda: [f"{table} {'created' if created else 'is there already'}"]
    )


@idempotent.command(cls=CeleryCommand)
@as_json
@click.pass_context
def stats(ctx: click.Context, json_: bool) -> None:
    """Count the rows by task and status, and the copies that were skipped."""
    with _queue_log(ctx) as queue_log:
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
    _print(json_, records, lambda: _table(records, ("task_name", "status", "processed_status", "rows", "duplicates")))


@idempotent.command(name="list", cls=CeleryCommand)
@click.option("--task", "task_name", help="Only this task; * and ? are wildcards.")
@click.option("--message-id", help="Only this message id; * and ? are wildcards.")
@click.option("--status", type=click.Choice([str(status) for status in Status]), help="Only rows in this status.")
@click.option(
    "--processed-status",
    type=click.Choice([str(status) for status in ProcessedStatus]),
    help="Only messages that ended so.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many, newest first."
)
@as_json
@click.pass_context
def list_(
    ctx: click.Context,
    task_name: str | None,
    message_id: str | None,
    status: str | None,
    processed_status: str | None,
    limit: int,
    json_: bool,
) -> None:
    """List messages, newest first."""
    where = RowFilter(
        message_id=message_id,
        task_name=task_name,
        status=None if status is None else Status(status),
        processed_status=None if processed_status is None else ProcessedStatus(processed_status),
        limit=limit,
    )
    with _queue_log(ctx) as queue_log:
        records = [_record(row) for row in queue_log.store.rows(where)]
    _print(json_, records, lambda: _table(records, _LISTED))
    if len(records) == limit and not json_:
        click.echo(f"these are the newest {limit}; there may be more: see --limit", err=True)


@idempotent.command(cls=CeleryCommand)
@click.argument("message_id")
@click.option("--task", "task_name", help="Only this task's message, when several tasks use the id.")
@as_json
@click.pass_context
def show(ctx: click.Context, message_id: str, task_name: str | None, json_: bool) -> None:
    """Show all that is known of the message MESSAGE_ID."""
    with _queue_log(ctx) as queue_log:
        names = [task_name] if task_name else _tasks_of(queue_log, message_id)
        found = [row for name in names if (row := queue_log.store.find(MessageKey(message_id, name))) is not None]
        records = [{**_record(row), **_contents(queue_log.app, row)} for row in found]
    if not records:
        raise click.ClickException(f"no message {message_id!r}" + (f" of task {task_name}" if task_name else ""))
    _print(json_, records, lambda: _sheets(records))


@contextmanager
def _queue_log(ctx: click.Context) -> Iterator[QueueLog]:
    """The queue log of the app given by ``-A``; what is wrong with it becomes one line and an exit status."""
    queue_log = QueueLog.of(ctx.obj.app)
    try:
        if ctx.find_root().params.get("app") is None and queue_log.settings == Settings():
            # Celery goes on with an app of its own, and that one's queue log would be an empty file made here and now.
            raise click.UsageError("which app? Name it: celery -A proj idempotent ...")
        yield queue_log
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error
    except StoreError as error:
        raise click.ClickException(str(error)) from error
    finally:
        queue_log.close()


def _tasks_of(queue_log: QueueLog, message_id: str) -> list[str]:
    """The tasks that use a message id."""
    if "*" in message_id or "?" in message_id:  # which a filter would take for a pattern
        return sorted({count.task_name for count in queue_log.store.counts()})
    return sorted(row.key.task_name for row in queue_log.store.rows(RowFilter(message_id=message_id, limit=1000)))


def _record(row: Row) -> dict[str, Any]:
    """A row as plain data, without its encoded message and result."""
    flat = {"message_id": row.key.message_id, "task_name": row.key.task_name}
    kept = (field.name for field in fields(Row) if field.name not in ("key", "message", "result", "read_at"))
    return {**flat, **{name: getattr(row, name) for name in kept}}


def _contents(app: Celery, row: Row) -> dict[str, Any]:
    """Arguments and result, as far as the app may read them."""
    contents: dict[str, Any] = {}
    if row.message is not None:
        try:
            contents["args"], contents["kwargs"], _ = decode_message(app, row.message)
        except UndecodableError as error:
            contents["undecodable_message"] = str(error)
    if row.result is not None:
        try:
            contents["result"] = decode_result(app, row.result)
        except UndecodableError as error:
            contents["undecodable_result"] = str(error)
    return contents


# -- printing --------------------------------------------------------------------------------------------------------------


def _print(json_: bool, data: Any, text: Callable[[], Iterable[str]]) -> None:
    lines = [json.dumps(_plain(data), indent=2)] if json_ else map(_printable, text())
    for line in lines:
        click.echo(line)


def _plain(value: Any) -> Any:
    """The nearest that JSON has."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, (date, time)):
        return value.isoformat()
    return str(value) if isinstance(value, (Decimal, UUID)) else repr(value)


def _printable(line: str) -> str:
    """The line without what would move a terminal's cursor, or what its encoding has not got: an id can be any text."""
    escaped = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return value.isoformat(sep=" ", timespec="milliseconds") if isinstance(value, datetime) else str(value)


def _table(records: Sequence[dict[str, Any]], columns: Sequence[str]) -> Iterable[str]:
    if not records:
        return ["no rows"]
    rows = [columns, *([_printable(_cell(record[column])) for column in columns] for record in records)]
    widths = [max(_width(row[index]) for row in rows) for index in range(len(columns))]
    return ["  ".join(map(_padded, row, widths)).rstrip() for row in rows]


def _padded(cell: str, width: int) -> str:
    return cell + " " * (width - _width(cell))


def _width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(0 if combining(character) else 2 if east_asian_width(character) in "FW" else 1 for character in text)


def _sheets(records: Sequence[dict[str, Any]]) -> Iterable[str]:
    for number, record in enumerate(records):
        if number:
            yield ""
        width = max(map(len, record))
        for name, value in record.items():
            yield f"{name.ljust(width)}  {_cell(value)}"
