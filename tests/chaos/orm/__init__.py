"""A Django project for a run of chaos: its settings, and the tables of the effects as models."""

from __future__ import annotations

import os

__all__ = ["SETTINGS", "VARIABLE", "is_used"]

#: The environment variable that makes a process one of this project, and its value.
SETTINGS = ("DJANGO_SETTINGS_MODULE", "tests.chaos.orm.settings")

#: The environment variable that holds the database's URL, as SQLAlchemy has it.
VARIABLE = "CELERY_IDEMPOTENT_CHAOS_DATABASE"


def is_used() -> bool:
    """Return whether this process is one of this project; set Django up if so."""
    if os.environ.get(SETTINGS[0]) != SETTINGS[1]:
        return False
    import django

    django.setup()
    return True
