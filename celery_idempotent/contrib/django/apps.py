"""The Django app."""

from __future__ import annotations

from django.apps import AppConfig

__all__ = ["QueueLogConfig"]


class QueueLogConfig(AppConfig):
    """The queue log's app: its table, its admin page, its checks, and ``manage.py idempotent``."""

    name = "celery_idempotent.contrib.django"
    label = "celery_idempotent"
    verbose_name = "Queue log"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the checks."""
        from celery_idempotent.contrib.django import checks  # noqa: F401
