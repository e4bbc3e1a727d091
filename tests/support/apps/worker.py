"""The app of the tests' workers: ``celery -A tests.support.apps.worker worker``."""

from __future__ import annotations

import os

from tests.support.apps.spec import AppSpec

app = AppSpec.from_environment(os.environ).build()
