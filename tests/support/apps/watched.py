"""The app for Flower and its workers: ``celery -A tests.support.apps.watched flower``."""

from __future__ import annotations

import os

from celery_idempotent.contrib import flower
from tests.support.apps.spec import AppSpec

app = AppSpec.from_environment(os.environ).build()
flower.install(app)
