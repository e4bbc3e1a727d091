"""What the tests of the frameworks share: the outbox app, and a Django project on PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from celery_idempotent import IdempotentTask
from tests.integration.producer.outbox.conftest import OutboxApp, effects, outbox_app
from tests.support.apps import close_app
from tests.support.brokers import filesystem_broker
from tests.support.effects import Effects
from tests.support.stores import postgresql_store
from tests.support.worker import ROOT

__all__ = ["OutboxApp", "Shop", "effects", "outbox_app", "shop"]


@dataclass
class Shop:
    """The project of the folder ``shop``: what is in it can only be imported when Django has its settings."""

    outbox_app: OutboxApp
    Order: Any
    charge: IdempotentTask
    sweep: Callable[[float], int]

    def process(self, *, killed: bool) -> tuple[int, int]:
        """Place an order in another process, which may be killed right after its commit.

        Returns:
            The order's key, and how the process ended.
        """
        environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.integration.frameworks.shop.settings"}
        command = [sys.executable, "-m", "tests.integration.frameworks.shop", *(["killed"] if killed else [])]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout, done.stderr
        return int(done.stdout), done.returncode

    def message(self, order: int) -> str | None:
        """Return the status of an order's message in the queue log; ``None`` when there is none."""
        row = self.outbox_app.row("charge", f"order:{order}")
        return None if row is None else row.status.value


@pytest.fixture(scope="session")
def opened_shop(postgresql_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """Yield the project, set up once: Django has one set of settings per process."""
    import django
    from django.conf import settings
    from django.db import connections

    folder = tmp_path_factory.mktemp("shop")
    filesystem_broker(folder)
    with postgresql_store(postgresql_url) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOP_DATABASE", url)
        patch.setenv("SHOP_BROKER", str(folder / "broker"))
        from tests.integration.frameworks.shop import settings as project

        # The variable DJANGO_SETTINGS_MODULE would change every Celery app made in this process from now on.
        settings.configure(**{name: getattr(project, name) for name in dir(project) if name.isupper()})
        django.setup()
        from tests.integration.frameworks.shop import models, tasks

        with connections["default"].schema_editor() as editor:
            editor.create_model(models.Order)
        tasks.app.finalize()
        tasks.app.queue_log.init()
        effects = Effects(url)
        yield Shop(OutboxApp(tasks.app, effects, "shop"), models.Order, tasks.charge, tasks.sweep)
        connections.close_all()
        effects.close()
        close_app(tasks.app)


@pytest.fixture
def shop(opened_shop: Shop) -> Shop:
    """Return the project, with no orders and nothing on the broker."""
    opened_shop.Order.objects.all().delete()
    opened_shop.outbox_app.messages()
    return opened_shop
