"""The command ``init``."""

from __future__ import annotations

import click
from celery.bin.base import CeleryCommand

from celery_idempotent.cli.opening import opened
from celery_idempotent.cli.options import as_json
from celery_idempotent.cli.printing import print_

__all__ = ["init"]


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
