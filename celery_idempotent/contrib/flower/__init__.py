"""A *Queue log* page in Flower, and ``celery_idempotent_*`` series in its ``/metrics``.

One call in the app's module, which Flower imports before it builds its own pages::

    from celery_idempotent.contrib import flower

    flower.install(app)

See "Watch the queue log in Flower". Nothing here imports Flower: where it does not run, :func:`install` does nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["install"]


def install(app: Celery) -> None:
    """Add the page, and the series, to the Flower of this process.

    The ``celery`` command imports what commands are installed before it imports the app, so that ``flower.urls`` is there if Flower is
    installed. A program that makes a ``flower.app.Flower`` of its own imports ``flower.app`` before it calls this.

    Args:
        app: The app whose queue log is shown. Its store is opened at the first request; in a worker never. A second call, for whatever app,
            replaces the first.
    """
    if "flower.urls" in sys.modules:
        from celery_idempotent.contrib.flower.pages import add

        add(app)
