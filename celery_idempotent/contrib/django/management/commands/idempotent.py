"""``manage.py idempotent``: the command line of the queue log, for the project's Celery app."""

from __future__ import annotations

from typing import Any

from celery.bin.base import CLIContext
from django.core.management.base import BaseCommand

from celery_idempotent.cli import idempotent
from celery_idempotent.contrib.django.project import celery_app

__all__ = ["Command"]


class Command(BaseCommand):
    """Pass the arguments on."""

    help = "See, set up and mend the queue log: manage.py idempotent --help"
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's

    def run_from_argv(self, argv: list[str]) -> None:
        """Run with the arguments unparsed, and exit."""
        self.handle(*argv[2:])

    def handle(self, *arguments: str, **options: Any) -> None:
        """Run ``celery idempotent`` for the project's app."""
        app = celery_app()
        context = CLIContext(app=app, no_color=bool(options.get("no_color")), workdir=None)
        idempotent.main(args=list(arguments), prog_name="manage.py idempotent", obj=context)
