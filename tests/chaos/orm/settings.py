"""The settings. The database is the run's, by an environment variable: where workers and senders find the queue log, too."""

from __future__ import annotations

import os

from sqlalchemy import make_url

from tests.chaos.orm import VARIABLE

_url = make_url(os.environ[VARIABLE])

if _url.get_backend_name() == "mysql":
    import pymysql

    pymysql.version_info = (2, 2, 7, "final", 0)  # what Django asks of mysqlclient
    pymysql.install_as_MySQLdb()

SECRET_KEY = "only for this run"
USE_TZ = True
INSTALLED_APPS = ["celery_idempotent.contrib.django", "tests.chaos.orm"]
DATABASES = {
    "default": {
        "ENGINE": f"django.db.backends.{_url.get_backend_name()}",
        "NAME": _url.database,
        "USER": _url.username or "",
        "PASSWORD": _url.password or "",
        "HOST": _url.host or "",
        "PORT": _url.port or "",
        "OPTIONS": {"connect_timeout": 5},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
CELERY_IDEMPOTENT_STORE = "django://default"
