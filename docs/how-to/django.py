# What django.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN201, D100, E402, D103, F401, F821, I001, INP001

# %% before block 1
import sys
import unittest

import django
from django.conf import settings
from django.core.management import call_command
from django.db import connection, models, transaction
from django.http import HttpResponse
from celery import shared_task
from celery_idempotent import outbox

sys.modules["shop"].__path__, sys.modules["shop"].__file__ = ["."], "shop.py"

# %% after block 1
settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "django.db"}},
    INSTALLED_APPS=INSTALLED_APPS,
    USE_TZ=True,
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    CELERY_IDEMPOTENT_STORE=CELERY_IDEMPOTENT_STORE,
    CELERY_BROKER_URL="memory://",
    CELERY_RESULT_BACKEND="cache+memory://",
)
django.setup()
from django.test import TestCase
from django.test.utils import setup_test_environment

app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.set_default()
call_command("migrate", verbosity=0)
call_command("check", databases=["default"])

from celery_idempotent.contrib.django.models import Message


def sent():
    return {message.message_id for message in Message.objects.filter(published_at__isnull=False)}


# %% after block 2
with connection.schema_editor() as editor:
    editor.create_model(Order)
    editor.create_model(Payment)

# %% after block 3
assert place(None).content == b"1"
assert sent() == {"charge:1"}

# %% after block 4
setup_test_environment()
result = unittest.TestResult()
unittest.defaultTestLoader.loadTestsFromTestCase(OrdersTest).run(result)
assert (result.testsRun, result.errors, result.failures) == (1, [], []), result
assert (Order.objects.count(), Payment.objects.count(), sent()) == (1, 0, {"charge:1"})

# %% after block 5
place_elsewhere(None)
Order.objects.create(amount=700)
sweep()
assert sent() == {"charge:1", "charge:2", "charge:3"}
app.queue_log.close()
app.close()
connection.close()
