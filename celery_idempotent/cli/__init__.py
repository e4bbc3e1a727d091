"""The command line: ``celery -A proj idempotent``.

Tables for people, ``--json`` for programs, an exit status for scripts:

==  ========================================================================================================================
0   done; ``doctor`` found nothing
1   a message was not found or was left as it is; the store did not answer; the broker took no message; the user answered no;
    ``doctor`` found an error
2   wrong usage or configuration
3   ``doctor`` found only warnings
==  ========================================================================================================================

Commands that change what an operator chooses (``requeue``, ``forget``, ``purge``, ``recover --lost-after``), or an existing table (``init``), ask
first in a terminal, and require ``--yes`` elsewhere. ``recover`` alone does what each worker does by itself, and does not ask.
"""

from __future__ import annotations

import click
from celery.bin.base import handle_preload_options

from celery_idempotent.cli.changing import forget, purge, requeue
from celery_idempotent.cli.recover import recover
from celery_idempotent.cli.setting_up import doctor, init
from celery_idempotent.cli.viewing import list_, show, stats

# Celery imports this module for each command: `celery inspect` needs the command in `control`, and `celery report` shows settings.
from celery_idempotent.core import settings_mask  # noqa: F401
from celery_idempotent.worker import control  # noqa: F401

__all__ = ["idempotent"]


@click.group(name="idempotent")
@click.pass_context
@handle_preload_options  # type: ignore[untyped-decorator]
def idempotent(ctx: click.Context) -> None:
    """Inspect, set up and repair the queue log of an app."""


for _command in (init, doctor, stats, list_, show, requeue, forget, recover, purge):
    idempotent.add_command(_command)
