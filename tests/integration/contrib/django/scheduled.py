"""The example's settings, with django-celery-beat and django-celery-results."""

from __future__ import annotations

import os
from importlib import import_module

_example = import_module(os.environ["SHOP_SETTINGS"])
globals().update({name: value for name, value in vars(_example).items() if name.isupper()})

INSTALLED_APPS = list(_example.INSTALLED_APPS)
INSTALLED_APPS += ["django_celery_beat", "django_celery_results"]
CELERY_BEAT_SCHEDULER = "celery_idempotent.contrib.django.beat:DatabaseScheduler"
CELERY_BEAT_MAX_LOOP_INTERVAL = 1
CELERY_RESULT_BACKEND = "django-db"
CELERY_RESULT_EXTENDED = True
