"""A Django project of the tests, whose database is a test's own, and its tables as models.

An :class:`~tests.support.apps.AppSpec` with ``orm`` makes the processes that it is handed to ones of this project: workers and producers,
never a test's own.
"""

from __future__ import annotations

import os

__all__ = ["TABLES", "URL", "environment", "is_used"]

#: Environment variables: the database's URL, as SQLAlchemy has it, and the Django app whose models are its tables.
URL, TABLES = "CELERY_IDEMPOTENT_TEST_ORM_URL", "CELERY_IDEMPOTENT_TEST_ORM_TABLES"

_SETTINGS = ("DJANGO_SETTINGS_MODULE", "tests.support.orm.settings")


def environment(url: str, tables: str) -> dict[str, str]:
    """Return what makes a process one of this project."""
    return {_SETTINGS[0]: _SETTINGS[1], URL: url, TABLES: tables}


def is_used() -> bool:
    """Return whether this process is one of this project; set Django up if so."""
    if os.environ.get(_SETTINGS[0]) != _SETTINGS[1]:
        return False
    import django

    django.setup()
    return True
