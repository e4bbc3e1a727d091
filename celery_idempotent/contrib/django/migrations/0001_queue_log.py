"""Create the queue log's table, in the database that ``CELERY_IDEMPOTENT_STORE`` names."""

from __future__ import annotations

from django.db import migrations, models

from celery_idempotent.contrib.django.keys import MessageKeyField
from celery_idempotent.contrib.django.project import table_name
from celery_idempotent.contrib.django.table import CreateQueueLog


class Migration(migrations.Migration):
    """The table, and the model that reads it."""

    initial = True
    dependencies = ()
    operations = (
        CreateQueueLog(
            name="Message",
            fields=[
                ("key", MessageKeyField(primary_key=True, serialize=False)),
                ("message_id", models.CharField(max_length=255)),
                ("task_name", models.CharField(max_length=255)),
                (
                    "status",
                    models.CharField(
                        max_length=16, choices=[(each, each) for each in ("pending", "processing", "done")]
                    ),
                ),
                (
                    "processed_status",
                    models.CharField(
                        max_length=16, null=True, choices=[(each, each) for each in ("success", "failure")]
                    ),
                ),
                ("created_timestamp", models.DateTimeField()),
                ("processed_timestamp", models.DateTimeField(null=True)),
                ("task_id", models.CharField(max_length=255)),
                ("queue", models.CharField(max_length=255, null=True)),
                ("attempt", models.IntegerField()),
                ("token", models.BigIntegerField()),
                ("worker", models.CharField(max_length=255, null=True)),
                ("lease_expires_at", models.DateTimeField(null=True)),
                ("available_at", models.DateTimeField(null=True)),
                ("published_at", models.DateTimeField(null=True)),
                ("expires_at", models.DateTimeField(null=True)),
                ("duplicates", models.IntegerField()),
                ("takeovers", models.IntegerField()),
                ("error", models.TextField(null=True)),
            ],
            options={
                "verbose_name": "message",
                "verbose_name_plural": "queue log",
                "db_table": table_name(),
                "default_permissions": ("view",),
                "permissions": (
                    ("requeue_message", "Can requeue a failed message"),
                    ("forget_message", "Can forget a message"),
                    ("view_arguments", "Can view a message's arguments and result"),
                ),
            },
        ),
    )
