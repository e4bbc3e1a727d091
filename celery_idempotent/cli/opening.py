"""Open the queue log of the app that a command is for, and print its errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from kombu.exceptions import OperationalError

from celery_idempotent.errors import ConfigurationError, StoreError
from celery_idempotent.queue_log import QueueLog
from celery_idempotent.settings import Settings

__all__ = ["one_line", "opened"]


@contextmanager
def opened(ctx: click.Context) -> Iterator[QueueLog]:
    """Yield the queue log of the app given by ``-A``; turn errors into one line and an exit status."""
    queue_log = QueueLog.of(ctx.obj.app)
    try:
        if ctx.find_root().params.get("app") is None and queue_log.settings == Settings():
            # Celery continues with a default app, whose queue log would be a new, empty file in this directory.
            raise click.UsageError("no app given: name it, as in celery -A proj idempotent ...")
        yield queue_log
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error
    except StoreError as error:
        raise click.ClickException(str(error)) from error
    except OperationalError as error:
        raise click.ClickException(
            f"the broker took no message: {one_line(error)}; unpublished messages wait in the queue log"
        ) from error
    finally:
        queue_log.close()


def one_line(error: Exception) -> str:
    """Return the text of an error in one line."""
    return " ".join(str(error).split())
