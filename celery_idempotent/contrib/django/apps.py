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
        """Register the checks, hear of each connection that Django opens, and keep what Celery's task class for Django has."""
        from celery.contrib.django.task import DjangoTask

        from celery_idempotent.contrib.django import checks, connections  # noqa: F401
        from celery_idempotent.task import IdempotentTask

        for name in ("delay_on_commit", "apply_async_on_commit"):
            setattr(IdempotentTask, name, vars(DjangoTask)[name])
