"""The queue log as a model, for the admin and for queries. The library writes the table."""

# ruff: noqa: ARG002, D106 - signatures and meaning are Django's

from __future__ import annotations

from typing import Any

from django.db import models

from celery_idempotent.contrib.django.keys import MessageKeyField
from celery_idempotent.contrib.django.project import alias_of_log, table_name

__all__ = ["Message"]


class _Messages(models.Manager):
    """Reads from the queue log's database, whatever the routers say."""

    def get_queryset(self) -> Any:
        return models.QuerySet(self.model, using=self._db or alias_of_log(), hints=self._hints)


class Message(models.Model):
    """A message of the queue log, read-only; use ``requeue`` and ``forget`` to change it."""

    key = MessageKeyField(primary_key=True)
    message_id = models.CharField(max_length=255)
    task_name = models.CharField(max_length=255)
    status = models.CharField(max_length=16, choices=[(each, each) for each in ("pending", "processing", "done")])
    processed_status = models.CharField(
        max_length=16, null=True, choices=[(each, each) for each in ("success", "failure")]
    )
    created_timestamp = models.DateTimeField()
    processed_timestamp = models.DateTimeField(null=True)
    task_id = models.CharField(max_length=255)
    queue = models.CharField(max_length=255, null=True)
    attempt = models.IntegerField()
    token = models.BigIntegerField()
    worker = models.CharField(max_length=255, null=True)
    lease_expires_at = models.DateTimeField(null=True)
    available_at = models.DateTimeField(null=True)
    published_at = models.DateTimeField(null=True)
    expires_at = models.DateTimeField(null=True)
    duplicates = models.IntegerField()
    takeovers = models.IntegerField()
    error = models.TextField(null=True)

    objects = _Messages()

    class Meta:
        db_table = table_name()
        verbose_name = "message"
        verbose_name_plural = "queue log"
        default_permissions = ("view",)
        permissions = (
            ("requeue_message", "Can requeue a failed message"),
            ("forget_message", "Can forget a message"),
            ("view_arguments", "Can view a message's arguments and result"),
        )

    def __str__(self) -> str:
        return f"{self.task_name}[{self.message_id}]"

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the library writes the table."""
        raise TypeError("a message of the queue log is not saved by hand; use requeue or forget")

    def delete(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the library writes the table."""
        raise TypeError("a message of the queue log is not deleted by hand; use forget or purge")
