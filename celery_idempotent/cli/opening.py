"""The queue log of the app that a command is for, and what becomes of its errors."""

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
    """Yield the queue log of the app given by ``-A``; what is wrong with it becomes one line and an exit status."""
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
            f"the broker took no message: {one_line(error)}; what was not published waits in the queue log"
        ) from error
    finally:
        queue_log.close()


def one_line(error: Exception) -> str:
    """Return the text of an error, whatever its lines."""
    return " ".join(str(error).split())
