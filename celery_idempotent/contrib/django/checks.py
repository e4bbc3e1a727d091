"""Check the queue log in ``manage.py check``."""

from __future__ import annotations

from typing import Any

from django.core.checks import Error, Tags, Warning, register  # noqa: A004 - Django's name for it
from django.db import connections
from django.db.migrations.recorder import MigrationRecorder

from celery_idempotent.contrib.django.project import alias_of_log, celery_app, queue_log, table_name
from celery_idempotent.errors import ConfigurationError

__all__ = ["check_settings", "check_table"]


@register("celery_idempotent")
def check_settings(app_configs: Any, **options: Any) -> list[Any]:  # noqa: ARG001 - Django's signature
    """Check the settings, and that the store opens."""
    app = celery_app()
    try:
        log = queue_log()
        store = str(log.settings.store)
        log.store  # noqa: B018 - opens it, which connects to nothing
    except ConfigurationError as error:
        return [Error(str(error), id="celery_idempotent.E001")]
    found: list[Any] = []
    if not log.settings.enabled:
        found.append(
            Warning(
                "CELERY_IDEMPOTENT_ENABLED is False: the guard is off for all tasks, so each repeated call and each copy runs.",
                hint="Remove it as soon as the incident or the load test is over.",
                id="celery_idempotent.W003",
            )
        )
    if alias_of_log() is None:
        found.append(
            Warning(
                f"The queue log is not in one of Django's databases, but at {store.partition('://')[0]}://",
                hint='So calls are no part of transaction.atomic(). Set CELERY_IDEMPOTENT_STORE = "django://default".',
                id="celery_idempotent.W001",
            )
        )
    if app.conf.task_always_eager:
        found.append(
            Warning(
                "CELERY_TASK_ALWAYS_EAGER is on, so calls run in place and are recorded in the queue log that these settings name.",
                hint="For tests only: what a test records as done is not run again.",
                id="celery_idempotent.W002",
            )
        )
    return found


@register(Tags.database)
def check_table(app_configs: Any, databases: Any = None, **options: Any) -> list[Any]:  # noqa: ARG001
    """Check that the table exists if its migration was applied; only with ``--database``."""
    try:
        alias = alias_of_log()
    except ConfigurationError:
        return []  # `check_settings` reports it
    if not databases or alias not in databases:
        return []
    wrapper = connections[alias]
    migrated = any(app == "celery_idempotent" for app, _ in MigrationRecorder(wrapper).applied_migrations())
    if not migrated or table_name() in wrapper.introspection.table_names():
        return []
    return [
        Error(
            f"The table {table_name()} is missing in the database of alias {alias!r}.",
            hint="It was migrated with another store, or under another name. Run `manage.py idempotent init`.",
            id="celery_idempotent.E002",
        )
    ]
