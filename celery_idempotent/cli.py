"""The command line: ``celery -A proj idempotent``.

Text for people, ``--json`` for programs. Exit status 0: done; 1: not found, or the store could not be asked, or the broker took no
message; 2: wrong usage or configuration.
"""

from __future__ import annotations

import json
import logging
import math
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import date, datetime, time
from decimal import Decimal
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any
from unicodedata import combining, east_asian_width
from uuid import UUID

import click
from celery.bin.base import CeleryCommand, handle_preload_options
from kombu.exceptions import OperationalError

from celery_idempotent.errors import ConfigurationError, StoreError, StoreUnavailableError
from celery_idempotent.queue_log import QueueLog
from celery_idempotent.records import MessageKey, ProcessedStatus, Row, RowFilter, Status
from celery_idempotent.recovery import Recovered
from celery_idempotent.serialization import UndecodableError, decode_message, decode_result
from celery_idempotent.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery import Celery

__all__ = ["idempotent"]

logger = logging.getLogger("celery_idempotent")

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

#: What a step did, in the words of people.
_RECOVERED = {
    "taken_back": "taken back {} whose worker died",
    "relayed": "relayed {} never published",
    "lost": "published again {} presumed lost",
    "purged": "purged {}",
}

#: The longest pause in seconds of `recover --watch` while the store or the broker is not there, unless its interval is longer.
_LONGEST_BACK_OFF = 60.0

#: How soon, in seconds, `recover --watch` notices between two steps that it is to end.
_NOTICE = 0.2

#: What may follow a number of seconds, by how many of them it stands for.
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def _duration(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """An option's seconds, which may be given with a unit."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) ?([smhdw]?)", value, re.ASCII)
    seconds = float(found[1]) * _UNITS[found[2]] if found else math.nan
    if not math.isfinite(seconds):
        raise click.BadParameter(
            f"{value!r} is not a number of seconds, 0 or more, nor one with s, m, h, d or w after it, like 7d",
            ctx,
            param,
        )
    return seconds


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


@idempotent.command(cls=CeleryCommand)
@click.option("--watch", is_flag=True, help="Go on, step after step, until interrupted or terminated.")
@click.option(
    "--interval",
    metavar="SECONDS",
    callback=_duration,
    help="Pause between two steps of --watch.  [default: idempotent_recovery_interval, or 30 where that is 0]",
)
@click.option(
    "--lost-after",
    metavar="SECONDS",
    callback=_duration,
    help="Publish every message again that has waited for longer, overtaken or not: for a broker that was emptied. "
    "Whatever it still has gets a copy. With --watch, once.",
)
@as_json
@click.pass_context
def recover(ctx: click.Context, watch: bool, interval: float | None, lost_after: float | None, json_: bool) -> None:
    """Publish what a dead worker, broker or producer left behind, and purge.

    This is what a worker does every idempotent_recovery_interval seconds: it takes back messages whose worker died, relays those
    that were recorded and never published, publishes those again that the broker is presumed to have lost, and deletes rows
    past idempotent_retention. Which messages were published goes to the log.

    Any number may run at once, beside workers too. Should a message be published that the broker still has, the claim absorbs the
    copy: it is skipped, and counted as a duplicate. A message that was published again goes to the end of its queue.
    """
    if interval is not None and (interval == 0 or not watch):
        raise click.UsageError("--interval is the pause of --watch, and more than 0")
    with _queue_log(ctx) as queue_log:
        queue_log.app.loader.import_default_modules()  # a message whose task is not known is left alone
        if watch:
            _watch(queue_log, interval or queue_log.settings.recovery_interval or 30.0, lost_after, json_)
        else:
            done = sum(queue_log.recovery.steps(lost_after=lost_after, in_flight=True), start=Recovered())
            _print(json_, asdict(done), lambda: [_recovered(done) or "nothing was due"])


@idempotent.command(cls=CeleryCommand)
@click.option(
    "--older-than",
    metavar="SECONDS",
    callback=_duration,
    help="Only what was done so long ago, e.g. 7d.  [default: idempotent_retention]",
)
@as_json
@click.pass_context
def purge(ctx: click.Context, older_than: float | None, json_: bool) -> None:
    """Delete the rows of messages that are done.

    Workers do this by themselves. With its row a message is forgotten: a late copy of it would run, and its id may be used again.
    An id that unique_for still keeps taken keeps its row.
    """
    with _queue_log(ctx) as queue_log:
        purged = queue_log.recovery.purge(older_than=older_than, within=math.inf)
    _print(json_, {"purged": purged}, lambda: [f"purged {purged}"])


def _watch(queue_log: QueueLog, interval: float, lost_after: float | None, json_: bool) -> None:
    """Recover every so many seconds until told to stop; a store or a broker that is not there is waited for."""
    with _told_to_stop() as stopped:
        in_vain = 0
        while not stopped():
            try:
                for done in queue_log.recovery.steps(lost_after=lost_after, stopped=stopped):
                    if done != Recovered():
                        click.echo(json.dumps(asdict(done)) if json_ else _recovered(done))
            except (StoreUnavailableError, OperationalError) as error:
                in_vain += 1
                pause = min(interval * 2**in_vain, max(interval, _LONGEST_BACK_OFF))
                logger.error("recovery goes on in %g s: %s", pause, _one_line(error))
            else:
                in_vain, pause = 0, interval
                lost_after = None  # again and again, it would publish a backlog for being one
            until = monotonic() + pause
            while not stopped() and (left := until - monotonic()) > 0:
                sleep(min(left, _NOTICE))


@contextmanager
def _told_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came: what is under way is ended in good order. The second one means it at once."""
    told: list[int] = []

    def stop(signum: int, _: object) -> None:
        told.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(told)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _recovered(done: Recovered) -> str:
    """What was done, in a line; empty if nothing was."""
    return ", ".join(_RECOVERED[name].format(count) for name, count in asdict(done).items() if count)


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
    except OperationalError as error:
        raise click.ClickException(
            f"the broker took no message: {_one_line(error)}; what was not published waits in the queue log"
        ) from error
    finally:
        queue_log.close()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
