"""A *Queue log* page in Flower, and ``celery_idempotent_*`` series in its ``/metrics``.

Install it by one call in the app's module, which Flower imports before it builds its own pages::

    from celery_idempotent.contrib import flower

    flower.install(app)

See "Watch the queue log in Flower". This module does not import Flower. Outside of Flower, :func:`install` does nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["install"]


def install(app: Celery) -> None:
    """Add the page, and the series, to the Flower of this process.

    The ``celery`` command imports all installed commands before the app, so ``flower.urls`` is there if Flower is installed. A program
    that makes its own ``flower.app.Flower`` must import ``flower.app`` before it calls this.

    Args:
        app: The app whose queue log is shown. Its store is opened at the first request, and never in a worker. A second call, for any app,
            replaces the first.
    """
    if "flower.urls" in sys.modules:
        from celery_idempotent.contrib.flower.pages import add

        add(app)
