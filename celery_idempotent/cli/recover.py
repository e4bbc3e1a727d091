"""The command ``recover``: once, or step after step."""

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

#: What a step did, in the words of people.
_RECOVERED = {
    "taken_back": "taken back {} whose worker died",
    "relayed": "relayed {} never published",
    "lost": "published again {} presumed lost",
    "purged": "purged {}",
}

#: What a step would do, and what would become of a message that is due.
_WOULD = {
    "taken_back": "take back {} whose worker died",
    "relayed": "relay {} never published",
    "lost": "publish again {} presumed lost",
    "purged": "purge {}",
}
_DUE = {"taken_back": "be taken back", "relayed": "be relayed", "lost": "be published again"}

#: So many messages of each kind are looked at by a dry run.
_LOOKED_AT = 1000

#: The longest pause in seconds of `recover --watch` while the store or the broker is not there, unless its interval is longer.
_LONGEST_PAUSE = 60.0

#: How soon, in seconds, `recover --watch` notices between two steps that it is to end.
_NOTICE = 0.2


@click.command(cls=CeleryCommand)
@click.option("--watch", is_flag=True, help="Go on, step after step, until interrupted or terminated.")
@click.option(
    "--interval",
    metavar="SECONDS",
    callback=duration,
    help="Pause between two steps of --watch.  [default: idempotent_recovery_interval, or 30 where that is 0]",
)
@click.option(
    "--lost-after",
    metavar="SECONDS",
    callback=duration,
    help="Publish every message again that has waited for longer, overtaken or not: for a broker that was emptied. "
    "Whatever it still has gets a copy. With --watch, once.",
)
@click.option(
    "--task",
    help="With --lost-after: only messages of this task. Those of a task that is turned off (idempotent=False) are published only so.",
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

    This is what a worker does every idempotent_recovery_interval seconds: it takes back messages whose worker died, relays those
    that were recorded and never published, publishes those again that the broker is presumed to have lost, and deletes rows
    past idempotent_retention. Which messages were published goes to the log.

    Any number may run at once, beside workers too. Should a message be published that the broker still has, the claim absorbs the
    copy: it is skipped, and counted as a duplicate. A message that was published again goes to the end of its queue.

    --dry-run lists what is due, without a broker. What runs and waits goes on meanwhile, so that it need not be what is done next.
    """
    if interval is not None and (interval == 0 or not watch):
        raise click.UsageError("--interval is the pause of --watch, and more than 0")
    if watch and dry_run:
        raise click.UsageError("--dry-run is one look, without --watch")
    if task is not None and lost_after is None:
        raise click.UsageError("--task is about --lost-after: a step recovers all tasks")
    with opened(ctx) as queue_log:
        queue_log.app.loader.import_default_modules()  # a message whose task is not known is left alone
        if dry_run:
            due = Recovery(queue_log).due(lost_after=lost_after, task=task, at_most=_LOOKED_AT)
            print_(json_, _plain(due), lambda: _listed(due))
            return
        if lost_after is not None:
            confirmed(f"Publish again {task or 'every message'} that has waited for {lost_after:g} s?", yes=yes)
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
        yield f"no more than {_LOOKED_AT} of each kind were looked at"


def _watch(queue_log: QueueLog, interval: float, lost_after: float | None, task: str | None, json_: bool) -> None:
    """Recover every so many seconds until told to stop; a store or a broker that is not there is waited for."""
    backoff = Backoff(2 * interval, longest=max(interval, _LONGEST_PAUSE))
    with _told_to_stop() as stopped:
        in_vain = 0
        while not stopped():
            try:
                for done in Recovery(queue_log).passes(lost_after=lost_after, task=task, stopped=stopped):
                    if done != Recovered():
                        click.echo(json.dumps(asdict(done)) if json_ else _recovered(done))
            except (StoreUnavailableError, OperationalError) as error:
                in_vain += 1
                pause = backoff.pause(in_vain)
                logger.error("recovery goes on in %g s: %s", pause, one_line(error))
            else:
                in_vain, pause = 0, interval
                lost_after = None  # again and again, it would publish a backlog for being one
            until = monotonic() + pause
            while not stopped() and (left := until - monotonic()) > 0:
                sleep(min(left, _NOTICE))


@contextmanager
def _told_to_stop() -> Iterator[Callable[[], bool]]:
    """Return whether SIGINT or SIGTERM came: what is under way is ended in good order. The second one means it at once."""
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


def _recovered(done: Recovered, words: Mapping[str, str] = _RECOVERED) -> str:
    """Return what was done, in a line; empty if nothing was."""
    return ", ".join(words[name].format(count) for name, count in asdict(done).items() if count)
