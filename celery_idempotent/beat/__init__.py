"""Schedulers for ``celery beat`` that send each tick once, however many beats run.

Use :class:`PersistentScheduler` in place of Celery's own::

    app.conf.beat_scheduler = "celery_idempotent.beat:PersistentScheduler"

:class:`IdempotentScheduler` does the same for any other scheduler: put it first among the bases. Ready-made are
``celery_idempotent.contrib.django.beat.DatabaseScheduler`` and ``celery_idempotent.contrib.redbeat.RedBeatScheduler``.
"""

from celery_idempotent.beat.due import CalendarTick, Tick
from celery_idempotent.beat.scheduler import IdempotentScheduler, PersistentScheduler

__all__ = ["CalendarTick", "IdempotentScheduler", "PersistentScheduler", "Tick"]
