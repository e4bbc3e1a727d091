"""The project's settings."""

from __future__ import annotations

import os

import django
from sqlalchemy import make_url

from tests.support.orm import TABLES, URL

_url = make_url(os.environ[URL])
_kind = _url.get_backend_name()

if _kind == "mysql":
    import pymysql

    pymysql.version_info = (2, 2, 7, "final", 0)  # what Django asks of mysqlclient
    pymysql.install_as_MySQLdb()

if _kind == "sqlite":
    _options = {"timeout": 30, **({"transaction_mode": "IMMEDIATE"} if django.VERSION >= (5, 1) else {})}
else:
    _options = {"connect_timeout": 5, **_url.query}

SECRET_KEY = "only for tests"
USE_TZ = True
INSTALLED_APPS = ["celery_idempotent.contrib.django", os.environ[TABLES]]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3" if _kind == "sqlite" else f"django.db.backends.{_kind}",
        "NAME": _url.database,
        "USER": _url.username or "",
        "PASSWORD": _url.password or "",
        "HOST": _url.host or "",
        "PORT": _url.port or "",
        "OPTIONS": _options,
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
CELERY_IDEMPOTENT_STORE = "django://default"
