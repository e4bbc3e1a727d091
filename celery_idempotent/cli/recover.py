"""The command ``recover``: once, or pass after pass."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from time import monotonic, sleep
from typing import Any

import click
from celery.bin.base import CeleryCommand
from kombu.exceptions import OperationalError

from celery_idempotent.cli.opening import one_line, opened
from celery_idempotent.cli.options import as_json, confirmed, dry_run, duration, yes
from celery_idempotent.cli.printing import print_, table
from celery_idempotent.core.backoff import Backoff
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.maintenance.recovery import Due, Recovered, Recovery
from celery_idempotent.queue_log import QueueLog

__all__ = ["recover"]

logger = logging.getLogger("celery_idempotent")

#: What a pass did, for people.
_RECOVERED = {
    "taken_back": "taken back {} whose worker died",
    "relayed": "relayed {} never published",
    "lost": "published again {} presumed lost",
    "purged": "purged {}",
}

#: What a pass would do, and what would happen to a message that is due.
_WOULD = {
    "taken_back": "take back {} whose worker died",
    "relayed": "relay {} never published",
    "lost": "publish again {} presumed lost",
    "purged": "purge {}",
}
_DUE = {"taken_back": "be taken back", "relayed": "be relayed", "lost": "be published again"}

#: How many messages of each kind a dry run reads.
_LOOKED_AT = 1000

#: The longest pause in seconds of `recover --watch` while the store or the broker is down, unless its interval is longer.
_LONGEST_PAUSE = 60.0

#: How soon, in seconds, `recover --watch` notices a signal between two passes.
_NOTICE = 0.2


@click.command(cls=CeleryCommand)
@click.option("--watch", is_flag=True, help="Continue, pass after pass, until interrupted or terminated.")
@click.option(
    "--interval",
    metavar="SECONDS",
    callback=duration,
    help="Pause between two passes of --watch.  [default: idempotent_recovery_interval, or 30 if that is 0]",
)
@click.option(
    "--lost-after",
    metavar="SECONDS",
    callback=duration,
    help="Publish all messages again that have waited for longer, overtaken or not: for a broker that was emptied. "
    "Messages that it still has get a copy. With --watch, once.",
)
@click.option(
    "--task",
    help="With --lost-after: only messages of this task. Messages that waited while the guard was off need this option.",
)
@dry_run
@yes
@as_json
@click.pass_context
def recover(
    ctx: click.Context,
    watch: bool,
    interval: float | None,
    lost_after: float | None,
    task: str | None,
    dry_run: bool,
    yes: bool,
    json_: bool,
) -> None:
    """Publish what a dead worker, broker or producer left behind, and purge.

    A worker does the same every idempotent_recovery_interval seconds: take back messages whose worker died, relay those that were recorded
    and never published, publish again those that the broker is presumed to have lost, and delete rows past idempotent_retention. The
    log names the messages that were published.

    Any number may run at once, together with workers. If the broker still has a message that is published again, the claim absorbs the
    copy: it is skipped, and counted as a duplicate. A message that is published again goes to the end of its queue.

    --dry-run lists what is due, and needs no broker. Messages move on meanwhile, so the next real run may find others.
    """
    if interval is not None and (interval == 0 or not watch):
        raise click.UsageError("--interval is the pause of --watch, and must be more than 0")
    if watch and dry_run:
        raise click.UsageError("--dry-run cannot be combined with --watch")
    if task is not None and lost_after is None:
        raise click.UsageError("--task requires --lost-after: otherwise, all tasks are recovered")
    with opened(ctx) as queue_log:
        queue_log.app.loader.import_default_modules()  # a message whose task is unknown is left alone
        if dry_run:
            due = Recovery(queue_log).due(lost_after=lost_after, task=task, at_most=_LOOKED_AT)
            print_(json_, _plain(due), lambda: _listed(due))
            return
        if lost_after is not None:
            of_task = f" of task {task}" if task else ""
            confirmed(f"Publish again all messages{of_task} that have waited for {lost_after:g} s?", yes=yes)
        if watch:
            _watch(queue_log, interval or queue_log.settings.recovery_interval or 30.0, lost_after, task, json_)
        else:
            done = Recovered()
            for step in Recovery(queue_log).passes(lost_after=lost_after, task=task, in_flight=True):
                done += step
                if step.more and sys.stderr.isatty():
                    click.echo(f"so far: {_recovered(done)}", err=True)
            print_(json_, asdict(done), lambda: [_recovered(done) or "nothing was due"])


def _plain(due: Due) -> dict[str, Any]:
    """Return what is due, for programs."""
    rows = {name: getattr(due, name) for name in _DUE}
    return {
        "dry_run": True,
        **{
            name: [
                {"message_id": row.key.message_id, "task_name": row.key.task_name, "task_id": row.task_id}
                for row in each
            ]
            for name, each in rows.items()
        },
        "purged": due.purged,
    }


def _listed(due: Due) -> Iterator[str]:
    """Yield what is due, for people: each message, and how many of each kind."""
    records = [
        {**{name: getattr(row, name) for name in ("status", "queue")}, **asdict(row.key), "would": would}
        for name, would in _DUE.items()
        for row in getattr(due, name)
    ]
    if records:
        yield from table(records, ("message_id", "task_name", "status", "queue", "would"))
    numbers = {name: len(getattr(due, name)) for name in _DUE}
    would = _recovered(Recovered(**numbers, purged=due.purged), _WOULD)
    yield f"would {would}" if would else "nothing is due"
    if max(numbers.values()) >= _LOOKED_AT:
        yield f"read at most {_LOOKED_AT} messages of each kind"


def _watch(queue_log: QueueLog, interval: float, lost_after: float | None, task: str | None, json_: bool) -> None:
    """Recover every ``interval`` seconds until a signal comes; while the store or the broker is down, wait for it."""
    backoff = Backoff(2 * interval, longest=max(interval, _LONGEST_PAUSE))
    with _stopped_by_signal() as stopped:
        in_vain = 0
        while not stopped():
            try:
                for done in Recovery(queue_log).passes(lost_after=lost_after, task=task, stopped=stopped):
                    if done != Recovered():
                        click.echo(json.dumps(asdict(done)) if json_ else _recovered(done))
            except (StoreUnavailableError, OperationalError) as error:
                in_vain += 1
                pause = backoff.pause(in_vain)
                logger.error("recovery continues in %g s: %s", pause, one_line(error))
            else:
                in_vain, pause = 0, interval
                lost_after = None  # repeated, it would publish a mere backlog again and again
            until = monotonic() + pause
            while not stopped() and (left := until - monotonic()) > 0:
                sleep(min(left, _NOTICE))


@contextmanager
def _stopped_by_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGINT or SIGTERM came. The first lets a pass finish; the second ends the process at once."""
    received: list[int] = []

    def stop(signum: int, _: object) -> None:
        received.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _recovered(done: Recovered, words: Mapping[str, str] = _RECOVERED) -> str:
    """Return what was done, in one line; empty for nothing."""
    return ", ".join(words[name].format(count) for name, count in asdict(done).items() if count)
