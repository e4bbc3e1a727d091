"""The settings of a shop that keeps its orders and its queue log in one database."""

import os
from pathlib import Path

import django

HERE = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SHOP_DATA", HERE / "data"))

SECRET_KEY = "only for this example"
DEBUG = os.environ.get("SHOP_DEBUG", "") == "1"
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "testserver"]
ROOT_URLCONF = "project.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
STATIC_URL = "static/"

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "celery_idempotent.contrib.django",
    "shop",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

# SHOP_DATABASE is for PostgreSQL or MariaDB: engine, name, user, password, host and port, with commas between them.
_PARTS = ("ENGINE", "NAME", "USER", "PASSWORD", "HOST", "PORT")
DATABASES = {
    "default": dict(zip(_PARTS, os.environ["SHOP_DATABASE"].split(","), strict=False))
    if "SHOP_DATABASE" in os.environ
    else {"ENGINE": "django.db.backends.sqlite3", "NAME": DATA / "shop.db", "OPTIONS": {"timeout": 30}}
}
if "SHOP_DATABASE" not in os.environ and django.VERSION >= (5, 1):
    # Web server and workers write at once: a transaction that reads first must not find out later that another one has written.
    DATABASES["default"]["OPTIONS"] |= {"transaction_mode": "IMMEDIATE", "init_command": "PRAGMA journal_mode = WAL"}

CELERY_BROKER_URL = os.environ.get("SHOP_BROKER", "filesystem://")
CELERY_BROKER_TRANSPORT_OPTIONS = (
    {
        "data_folder_in": str(DATA / "queue"),
        "data_folder_out": str(DATA / "queue"),
        "control_folder": str(DATA / "control"),
    }
    if CELERY_BROKER_URL == "filesystem://"
    else {}
)
CELERY_RESULT_BACKEND = f"file://{DATA / 'results'}"
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True

# The queue log is a table beside the orders.
CELERY_IDEMPOTENT_STORE = "django://default"
# Recover within seconds what a killed worker had taken. The defaults are minutes, which is right for a broker that keeps messages.
CELERY_IDEMPOTENT_LEASE = 10
CELERY_IDEMPOTENT_LOST_AFTER = 10
CELERY_IDEMPOTENT_RECOVERY_INTERVAL = 2
