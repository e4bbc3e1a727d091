"""The command line: ``celery -A proj idempotent``.

Tables for people, ``--json`` for programs, an exit status for scripts:

==  ========================================================================================================================
0   done; of ``doctor``: nothing found
1   a message was not found or stays as it is, or the store could not be asked, or the broker took no message; of ``doctor``: an
    error was found; of a question that was answered with no
2   wrong usage or configuration
3   of ``doctor``: nothing but warnings was found
==  ========================================================================================================================

Commands that change what an operator chooses (``requeue``, ``forget``, ``purge``, ``recover --lost-after``), or a table that is there (``init``), ask
first in a terminal, and require ``--yes`` elsewhere. ``recover`` without a choice does what each worker does by itself, and does not ask.
"""

from __future__ import annotations

import click
from celery.bin.base import handle_preload_options

from celery_idempotent.cli.changing import forget, purge, requeue
from celery_idempotent.cli.recover import recover
from celery_idempotent.cli.setting_up import doctor, init
from celery_idempotent.cli.viewing import list_, show, stats

# Celery imports us for every command: `celery inspect` asks for what `control` knows, and `celery report` shows settings.
from celery_idempotent.core import settings_mask  # noqa: F401
from celery_idempotent.worker import control  # noqa: F401

__all__ = ["idempotent"]


@click.group(name="idempotent")
@click.pass_context
@handle_preload_options  # type: ignore[untyped-decorator]
def idempotent(ctx: click.Context) -> None:
    """See, set up and mend the queue log of an app."""


for _command in (init, doctor, stats, list_, show, requeue, forget, recover, purge):
    idempotent.add_command(_command)
