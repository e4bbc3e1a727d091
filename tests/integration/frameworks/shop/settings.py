"""The settings of a small Django project, whose database is the queue log's."""

from __future__ import annotations

import os

from sqlalchemy import make_url

STORE = os.environ["SHOP_DATABASE"]
BROKER = os.environ["SHOP_BROKER"]

_url = make_url(STORE)

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _url.database,
        "USER": _url.username,
        "PASSWORD": _url.password,
        "HOST": _url.host,
        "PORT": _url.port,
        "OPTIONS": dict(_url.query),
    }
}
INSTALLED_APPS = ["tests.integration.frameworks.shop"]
ROOT_URLCONF = "tests.integration.frameworks.shop.views"
ALLOWED_HOSTS = ["testserver"]
SECRET_KEY = "a secret of nobody's"
TIME_ZONE = "Pacific/Auckland"
