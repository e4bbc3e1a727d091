"""django-celery-beat's scheduler, with one message for each tick.

Name it in the settings::

    CELERY_BEAT_SCHEDULER = "celery_idempotent.contrib.django.beat:DatabaseScheduler"
"""

from __future__ import annotations

from django_celery_beat import schedulers

from celery_idempotent.beat import IdempotentScheduler

__all__ = ["DatabaseScheduler"]


class DatabaseScheduler(IdempotentScheduler, schedulers.DatabaseScheduler):
    """django-celery-beat's ``DatabaseScheduler``; see :class:`~celery_idempotent.beat.IdempotentScheduler`.

    Entries are known by their names. One that is renamed is another entry.
    """
